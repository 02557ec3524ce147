"""The chat format of `dialogue.py` as a Jinja template, for programs that cannot pass token types.

transformers' `apply_chat_template` makes the ids of prompts, of prompts that begin the response,
and of answered dialogues from it. It stands in `tokenizer_config.json` of a ChatLM. The names of
the special tokens are the same in every tokenizer.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['assistant', 'user', 'system', 'developer']"
    " or message['content'] is not string %}"
    "{{ raise_exception('wanted messages of assistant, user, system or developer, as text') }}"
    "{% endif %}"
    "{% if not loop.first %}[SEP]{% endif %}{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[SEP]"
    "{% elif messages[-1]['role'] == 'assistant' %}[CLS]{% endif %}"
)
