"""`piecework serve MODEL`: an OpenAI-compatible server, from a stored bundle or after compiling one."""

from __future__ import annotations

import argparse
import gc
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from piecework.cli.command_parser import CommandParser
from piecework.cli.console import size_argument
from piecework.cli.vllm_flags import as_ours
from piecework.engine.options import engine_options, read_engine_options
from piecework.engine.profile_options import DEFAULT_STEPS, ProfileOptions
from piecework.errors import PieceworkError
from piecework.foundation.environment import read_environment
from piecework.foundation.process import keep_freed_memory, seconds_since_start
from piecework.spec.command_line import add_model, add_options, add_spec_options, spec_of
from piecework.spec.sampling_defaults import SamplingDefaults, read_sampling_defaults
from piecework.spec.source import model_name

if TYPE_CHECKING:
    from fastapi import FastAPI

    from piecework.engine.options import EngineOptions
    from piecework.foundation.environment import Environment
    from piecework.server.log import EventLog
    from piecework.server.run import HttpServer
    from piecework.server.settings import ServerSettings
    from piecework.server.status import ServerStatus

_ENGINE: Final = (
    *("prefix_caching", "while_compiling", "bundle", "trust", "random_weights"),
    *("threads", "chat_template"),
)
_AUTO: Final = "auto"
_NO_FILE: Final = "vllm"
_EPILOG: Final = """\
vLLM's names are taken too: --model, --max-num-seqs, --max-num-batched-tokens, --dtype auto|half ...
The API key may also be given as $PIECEWORK_API_KEY, which other users of the machine don't see.
SIGTERM and Ctrl-C let running requests finish, up to --drain seconds; the exit code is then 0.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI does",
        description="Serve the model of a directory in Hugging Face layout at /v1/completions and "
        "/v1/chat/completions, or an encoder at /v1/embeddings, a cross-encoder at /v1/rerank and /v1/score; with a "
        "page to try it at /. Uses a valid bundle of the local store, else compiles one "
        "in a process of its own and stores it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    assert isinstance(parser, CommandParser)
    parser.rewrite = as_ours
    add_model(parser)
    _add_http(parser.add_argument_group("where and for whom"))
    _add_model(parser.add_argument_group("the model"))
    _add_limits(parser.add_argument_group("limits"))
    log = parser.add_argument_group("logging, on stderr, and figures")
    log.add_argument(
        "--metrics",
        choices=("piecework", "vllm"),
        default="piecework",
        help="whose names the figures at /metrics have (default: %(default)s)",
    )
    log.add_argument("--log-requests", action="store_true", help="log every request")
    log.add_argument("--json", action="store_true", help="log JSON objects, one a line")
    profile = parser.add_argument_group("profiling")
    profile.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a torch profiler trace of the first forwards into DIR"
    )
    profile.add_argument(
        "--profile-steps",
        type=_positive,
        default=DEFAULT_STEPS,
        metavar="N",
        help="forwards in the trace (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, and return the exit code.

    Raises UnsupportedModelError, BundleError, WeightsError, CompileError, RequestError, CapacityError.
    """
    gc.disable()  # start-up makes long-lived objects only
    keep_freed_memory()
    # `piecework --help` must not pay for these
    from piecework.server.listening import listen  # noqa: PLC0415
    from piecework.server.log import EventLog  # noqa: PLC0415
    from piecework.server.startup import ModelStart  # noqa: PLC0415
    from piecework.server.status import ServerStatus  # noqa: PLC0415

    environment = read_environment()
    options = _engine_options(args)
    spec = spec_of(args, weights=options.random_weights is None)
    settings = _settings(args, environment, spec.source)
    log = EventLog(sys.stderr, as_json=args.json)
    status = ServerStatus(clock=seconds_since_start)
    failed = threading.Event()
    with listen(args.host, port=args.port) as listening:
        start = ModelStart(spec, options, environment=environment, status=status, log=log, failed=failed)
        start.begin()
        try:
            _answer(args, listening, settings=settings, status=status, log=log, failed=failed)
        finally:
            start.stop()
    if start.error is not None:
        raise start.error
    log.event("ended", seconds=status.uptime_s)
    return 0


def _answer(
    args: argparse.Namespace,
    listening: socket.socket,
    *,
    settings: ServerSettings,
    status: ServerStatus,
    log: EventLog,
    failed: threading.Event,
) -> None:
    """Answer requests until the end."""
    from piecework.server.listening import url_of  # noqa: PLC0415

    with status.phase("import server"):
        make_app, server_class = _import_server()
        app = make_app(status, settings, log=log, log_requests=args.log_requests)

    def drain() -> None:
        status.drains()
        if not failed.is_set():
            log.event("draining", seconds=status.uptime_s)

    log.event("listening", url=url_of(listening), model=settings.model, seconds=status.uptime_s)
    server_class(app, listening=listening, limits=settings.limits, log=log, on_drain=drain, stop=failed).run()


def _import_server() -> tuple[Callable[..., FastAPI], type[HttpServer]]:
    """Import what takes part of a second, beside the model's start."""
    try:
        from piecework.server.app import make_app  # noqa: PLC0415
        from piecework.server.run import HttpServer  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise PieceworkError(
            asked="serve a model over HTTP", found=f"no package {error.name}", try_="pip install 'piecework[serve]'"
        ) from error
    return make_app, HttpServer


def _engine_options(args: argparse.Namespace) -> EngineOptions:
    profile = None if args.profile is None else ProfileOptions(args.profile, steps=args.profile_steps)
    return read_engine_options(vars(args), profile=profile)


def _settings(args: argparse.Namespace, environment: Environment, model_dir: Path) -> ServerSettings:
    from piecework.server.settings import Limits, ServerSettings  # noqa: PLC0415

    limits = Limits(
        body_bytes=args.max_body,
        prompt_tokens=args.max_prompt_tokens,
        prompts=args.max_prompts,
        texts=args.max_texts,
        n=args.max_n,
        logprobs=args.max_logprobs,
        concurrent_requests=args.max_requests,
        retry_after_s=args.retry_after,
        drain_s=args.drain,
        connections=args.max_connections,
        receive_s=args.receive_timeout,
    )
    return ServerSettings(
        model_names=tuple(args.served_model_name or [model_name(args.model)]),
        api_key=args.api_key if args.api_key is not None else environment.api_key,
        limits=limits,
        defaults=_defaults(args, model_dir),
        seed=args.seed,
        dialect=args.tool_call_parser,
        metrics=args.metrics,
        hosts=(args.host, *(args.allowed_host or ())),
    )


def _defaults(args: argparse.Namespace, model_dir: Path) -> SamplingDefaults:
    """Return what is taken where a request says nothing; raises UnsupportedModelError for a broken file."""
    where = model_dir if args.generation_config == _AUTO else Path(args.generation_config)
    defaults = SamplingDefaults() if args.generation_config == _NO_FILE else read_sampling_defaults(where)
    chosen = args.default_temperature
    return defaults if chosen is None else replace(defaults, temperature=chosen)


def _add_http(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s; 0.0.0.0: all)")
    group.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="port (default: %(default)s; 0: a free one)"
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        help="a name under which clients may call the server, beside localhost and addresses; may be given several "
        "times ('*': any)",
    )
    group.add_argument("--api-key", metavar="KEY", help="what clients of /v1/ must send (default: none)")
    group.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="the model's name for clients; may be given several times (default: the directory's)",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    add_spec_options(group)
    add_options(group, engine_options("max_seqs", "max_model_len"))
    add_options(group.add_mutually_exclusive_group(), engine_options("kv_cache_memory", "memory_fraction"))
    add_options(group, engine_options(*_ENGINE))
    group.add_argument(
        "--default-temperature",
        type=float,
        metavar="T",
        help="where a request names none (default: generation_config.json's, else 1, as OpenAI has it)",
    )
    group.add_argument(
        "--generation-config",
        default=_AUTO,
        metavar="DIR",
        help="whose generation_config.json says how to sample where a request doesn't; vllm: nobody's "
        "(default: the model's)",
    )
    group.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how the model writes calls of tools and reasoning: hermes, llama3_json, mistral, deepseek_v3, openai, "
        "think (default: as its chat template shows)",
    )
    group.add_argument(
        "--seed", type=_seed, metavar="N", help="of the random numbers of requests that name none (default: fresh ones)"
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-requests",
        type=_positive,
        default=512,
        metavar="N",
        help="requests at the same time; more get a 429 (default: %(default)s)",
    )
    group.add_argument(
        "--max-connections",
        type=_positive,
        default=2048,
        metavar="N",
        help="open at the same time; of more, idle ones are closed (default: %(default)s)",
    )
    group.add_argument(
        "--receive-timeout",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="for a request's head to arrive, and for each part of its body (default: %(default)g)",
    )
    group.add_argument(
        "--max-body", type=size_argument, default=8 << 20, metavar="SIZE", help="of a request (default: 8MiB)"
    )
    group.add_argument(
        "--max-prompt-tokens", type=_positive, metavar="N", help="of one prompt (default: what the model takes)"
    )
    group.add_argument(
        "--max-prompts", type=_positive, default=128, metavar="N", help="in one request (default: %(default)s)"
    )
    group.add_argument(
        "--max-texts", type=_positive, default=2048, metavar="N", help="to encode in one request (default: %(default)s)"
    )
    group.add_argument(
        "--max-n", type=_positive, default=16, metavar="N", help="continuations of one prompt (default: %(default)s)"
    )
    group.add_argument(
        "--max-logprobs",
        type=_positive,
        default=20,
        metavar="N",
        help="likeliest tokens reported at each place (default: %(default)s)",
    )
    group.add_argument(
        "--retry-after",
        type=_positive,
        default=1,
        metavar="SECONDS",
        help="what clients are told with a 429 or 503 (default: %(default)s)",
    )
    group.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for running requests to finish in at the end (default: %(default)g)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 62:
        raise argparse.ArgumentTypeError(f"{value} is no seed; seeds are 0 to 2**62")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{value} is no port; ports are 0 to 65535")
    return value
