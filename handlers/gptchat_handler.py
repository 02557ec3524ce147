"""The class that TorchServe calls; `service.py` does the work. This file may hold no other class.

With continuous batching TorchServe calls `handle` again and again with every live request. A
request's body comes only with its first call. A client that has left is missing from the next one.
Status and content type go out with the first chunk.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

from gptchat.config import build_server_settings
from handlers.page import render_page
from handlers.routes import describe
from handlers.served_model import load_served_model
from handlers.service import Arrival, Chunk, Service

SECONDS_TO_RETRY = "1"
log = logging.getLogger("gptchat")


class GptchatHandler:
    """Serves the model directory `model` in the archive's folder."""

    def initialize(self, context: Any) -> None:
        """Load the model and start decoding. Raises UserError for a wrong setting or model."""
        folder = Path(context.system_properties["model_dir"])
        settings = build_server_settings(context.model_yaml_config, "model-config.yaml")
        model = load_served_model(folder / "model", context.model_name, settings)
        chat_models = os.environ.get("GPTCHAT_CHAT_MODELS", model.name).split(",")
        self.metrics = context.metrics
        self.service = Service(
            model,
            page=render_page(model.name, chat_models, describe(model)) if model.chats else "",
            draining=Path(os.environ.get("GPTCHAT_RUN", folder)) / "draining",
            record=self.record,
            host=os.environ.get("GPTCHAT_HOST", "localhost"),
        )
        quiet_logging()
        self.service.start()
        log.info("worker of %s: process %d", model.name, os.getpid())

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """One result per request, in order; "" if there is nothing to send yet."""
        ids = [context.request_ids[i] for i in range(len(data))]
        arrivals = {
            id: Arrival(context.get_all_request_header(i), data[i].get("body"))
            for i, id in enumerate(ids)
            if id not in self.service.live
        }
        chunks = self.service.round(ids, arrivals)
        context.stopping_criteria = [stopping_criterion(chunk) for chunk in chunks]
        for i, chunk in enumerate(chunks):
            context.set_response_status(chunk.status, "", i)
            context.set_response_content_type(i, chunk.content_type)
            if chunk.status == 503:
                context.set_response_header(i, "Retry-After", SECONDS_TO_RETRY)
        return [chunk.text for chunk in chunks]

    def record(self, kind: str, name: str, value: float, labels: list[str]) -> None:
        self.metrics.get_metric(name, MetricTypes(kind)).add_or_update(value, labels)


def stopping_criterion(chunk: Chunk) -> Callable[[str], bool | None]:
    """What TorchServe calls after a chunk: True ends the stream, None says that there is none."""
    ends = None if chunk.is_first and chunk.is_last else chunk.is_last
    return lambda text: ends


def quiet_logging() -> None:
    """Have TorchServe log no line per round, which takes a third of it, nor for wrong JSON."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger().addFilter(
        lambda record: not record.getMessage().startswith(("Failed json", "Failed utf-8"))
    )
    metrics = logging.getLogger("ts.metrics.caching_metric")
    metrics.setLevel(logging.INFO)
    metrics.addFilter(lambda record: "PredictionTime" not in record.getMessage())
    logging.getLogger("gptchat").setLevel(logging.INFO)
