"""`gptchat serve`: archive models and run TorchServe over them, until Ctrl-C, SIGTERM or SIGHUP.

The launcher archives the models into RUN/store, starts Java, waits until each model answers, and
passes TorchServe's output on. RUN is locked against a second launcher.

At a signal the handlers refuse new requests, as the file `draining` in RUN tells them to. Live ones
have DRAIN_SECONDS; then Java and the workers end. Nothing outlives the launcher, even if it is
killed.

Exit status: 0 after a signal; 2 with one line if something is wrong or TorchServe ended by itself;
130 if the signal came before TorchServe was started, or a second one ended the draining.
"""

from collections.abc import Sequence

from gptchat.artifacts import lock_folder
from gptchat.runtime import handle_stop_signals
from gptchat.serve.archive import archive, check_settings
from gptchat.serve.options import EVERYWHERE, LOOPBACK, Options, read_options
from gptchat.serve.torchserve import DRAIN_SECONDS, TorchServe


def banner(options: Options) -> str:
    """What the launcher prints when all models answer."""
    host = "localhost" if options.host in (LOOPBACK, EVERYWHERE) else options.host
    lines = []
    for name in options.models:
        url = f"http://{host}:{options.port}/predictions/{name}"
        lines.append(f"{name:8} {url} (OpenAI's API: {url}/1.0/v1)")
    lines.append(f"metrics  {options.metrics_url}")
    if options.auth:
        lines.append(f"keys     {options.key_file}: send the inference key as a bearer token")
    lines.append("Ctrl-C stops it all.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    stops: list[int] = []  # the signals that have asked for a stop
    handle_stop_signals(lambda number, frame: stops.append(number))
    options = read_options(argv)
    check_settings(options.configs / "model-config.yaml")
    with lock_folder(options.run, "another `gptchat serve` works here"):
        archives = []
        for name, model in options.models.items():
            archives.append(archive(name, model, options))
            if stops:
                raise KeyboardInterrupt
        if options.archive_only:
            print("\n".join(str(options.run / "store" / name) for name in archives))
        else:
            serve(archives, options, stops)


def serve(archives: list[str], options: Options, stops: Sequence[int]) -> None:
    server = TorchServe(options, stops)
    try:
        server.start(archives)
        server.wait_until_ready()
        if not stops:
            print(banner(options), flush=True)
        server.wait()
        print(f"stopping: live requests have {DRAIN_SECONDS:.0f} s", flush=True)
        server.drain()
    finally:
        server.stop()
    if len(stops) > 1:
        raise KeyboardInterrupt
