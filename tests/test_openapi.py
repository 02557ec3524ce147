"""The OpenAPI description: it is what bodies are checked by. (tests/test_hostile.py: a server.)"""

import torch
from serving import ServiceClient

from gptchat.inference.sampling import SETTINGS
from handlers.body import SYNONYMS

torch.set_num_threads(1)


def description(folder, task):
    client = ServiceClient(folder, task)
    status, answer = client.ask(bytearray(), "v1/openapi.json")
    assert status == 200
    return answer


def test_description_has_the_routes_settings_and_limits_of_the_model(tmp_path):
    described = description(tmp_path, "chatlm")
    root = "/predictions/chatlm"
    posts = {path for path, methods in described["paths"].items() if "post" in methods}
    api = f"{root}/1.0/v1"
    assert posts == {root, f"{api}/completions", f"{api}/chat/completions"}
    gets = {path for path, methods in described["paths"].items() if "get" in methods}
    assert gets == {root, f"{api}/models", f"{api}/models/chatlm", f"{api}/openapi.json"}
    schemas = described["components"]["schemas"]
    for name in ("original", "completions", "chat"):
        properties = schemas[name]["properties"]
        assert set(SETTINGS) <= set(properties)
        for setting, names in SYNONYMS.items():
            for other in set(names) - {setting}:
                expected = properties[setting] | {"x-setting": setting}
                assert properties[other] == expected
    properties = schemas["original"]["properties"]
    assert properties["max_new_tokens"]["maximum"] == 128
    assert properties["n"] | {"description": ""} == {
        "type": "integer",
        "minimum": 1,
        "maximum": 16,
        "default": 5,
        "description": "",
    }
    assert schemas["original"]["additionalProperties"] is False
    assert schemas["original"]["required"] == ["context"]
    assert schemas["chat"]["properties"]["model"] == {"const": "chatlm"}


def test_description_of_a_language_model_has_no_chat(tmp_path):
    described = description(tmp_path, "lm")
    assert "/predictions/lm/1.0/v1/chat/completions" not in described["paths"]
    assert list(described["paths"]["/predictions/lm"]) == ["post"]
