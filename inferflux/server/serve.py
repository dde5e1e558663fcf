"""`run`: opens the port, loads the models, serves until told to stop, drains, leaves.

Knows the process: event loop, signals, exit status. The application itself is wired in `http/app`.
"""

import asyncio
import contextlib
import logging
import os
import signal
import ssl
from collections.abc import Sequence

from aiohttp import web

from inferflux import __version__
from inferflux.config import Config
from inferflux.config.process_env import audit_debug_of_process, passphrase_of_process
from inferflux.config.tree import ServerConfig
from inferflux.engine.service.client import EngineClient
from inferflux.engine.service.launch import EngineProcesses
from inferflux.errors import ConfigError, InferFluxError, ModelLoadError
from inferflux.log import JsonFormatter, LogFormat
from inferflux.server.admission import Admission, open_admission
from inferflux.server.audit.opening import open_audit
from inferflux.server.backends import Backend, BackendManager
from inferflux.server.backends.manager import OnEvent
from inferflux.server.certificate import ServedCertificate, open_certificate
from inferflux.server.http.app import build_app
from inferflux.server.http.runner import Runner
from inferflux.server.http.sockets import allow_many_connections
from inferflux.server.metrics import Metrics
from inferflux.server.model_source import ModelSource, find_sources
from inferflux.server.models.events import ModelEvents
from inferflux.server.models.models import Models, open_models
from inferflux.server.models.registry import ModelRegistry
from inferflux.server.policy.opening import open_policy
from inferflux.server.policy.seed import runtime_in_force
from inferflux.server.ranks import check_ranks, follow

try:
    from uvloop import new_event_loop
except ImportError:  # not every platform has it
    from asyncio import new_event_loop  # type: ignore[assignment]

logger = logging.getLogger(__name__)

BACKLOG = 1024
EXIT_RANKS_LOST = 1
# After the loss of a rank: clients read their errors, and probes see that nothing is ready.
LINGER_S = 1.0


class StopSignals:
    """SIGINT and SIGTERM: the first asks for a drained end, the second for an end at once. So does the loss of a rank.

    exit_code: 0 after a drained end by SIGTERM; 128 and the signal's number after Ctrl-C or an end at once; 1 after the
    loss of a rank.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        self.exit_code = 0

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._note, number)

    def lose_ranks(self, reason: str) -> None:
        """Ends the server: the ranks that share a model can only be restarted together."""
        logger.error("exiting, so that all ranks are restarted: %s", reason)
        self.exit_code = EXIT_RANKS_LOST
        self.asked.set()

    def _note(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            self.insisted.set()
        if self.asked.is_set() or number == signal.SIGINT:
            self.exit_code = 128 + number
        self.asked.set()


def run(config: Config, processes: EngineProcesses) -> int:
    """Serves until a signal; returns the exit status. processes: where the models' engines come from.

    Raises ConfigError for a configuration, a certificate or a policy store that cannot be used, InferFluxError when the
    port cannot be opened, ModelLoadError when no model can be loaded.
    """
    if config.distributed.rank > 0:
        return follow(config)
    allow_many_connections()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(config, processes))


async def _serve(config: Config, processes: EngineProcesses) -> int:
    signals = StopSignals()
    signals.listen()
    certificate = open_certificate(config.server.tls)
    # A configuration that cannot be served is refused before anything is opened.
    check_ranks(config, find_sources(config))
    metrics = Metrics()
    passphrase = passphrase_of_process()
    policy = open_policy(config, passphrase)
    audit = open_audit(config, passphrase, with_text=audit_debug_of_process(), on_result=metrics.count_audit)

    on_lost = signals.lose_ranks if config.distributed.world_size > 1 else None

    def make_client(source: ModelSource) -> EngineClient:
        runtime = runtime_in_force(config, policy.document)
        return EngineClient(source.model, runtime, config.distributed, on_lost, processes, source.adapters)

    def make_manager(sources: Sequence[ModelSource], on_event: OnEvent) -> BackendManager:
        return BackendManager(sources, make_client, on_event=_announcing(on_event, config.logging.format))

    models = open_models(config, policy, ModelEvents(metrics.model_event), make_manager)
    admission = open_admission(config.server, policy.document.fairness.policy)
    runner = Runner(build_app(config, models, metrics, admission, policy, audit))
    await runner.setup()
    try:
        url = await _open_port(runner, config.server, None if certificate is None else certificate.context)
        names = ", ".join(backend.id for backend in models.backends.backends) or "no model"
        _announce(f"InferFlux {__version__} listens on {url}; loading {names}", config.logging.format)
        await _serve_until_asked(models, certificate, signals, admission)
        await _drain(admission, signals, config.server.drain_timeout_s)
        if signals.exit_code == EXIT_RANKS_LOST:
            await asyncio.sleep(LINGER_S)
        return signals.exit_code
    finally:
        await models.backends.close()
        await runner.cleanup()
        await policy.close()
        if audit is not None:
            await asyncio.to_thread(audit.close)


async def _open_port(runner: web.AppRunner, server: ServerConfig, tls: ssl.SSLContext | None) -> str:
    """Returns the URL to reach the server at. Raises InferFluxError."""
    site = web.TCPSite(runner, server.host, server.http_port, ssl_context=tls, backlog=BACKLOG)
    try:
        await site.start()
    except OSError as error:
        # asyncio's own words name the address once more; a name that is not found has a number below zero.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise InferFluxError(f"cannot listen on {server.host}:{server.http_port}: {reason}") from error
    host, port = runner.addresses[0][:2]
    scheme = "http" if tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def _serve_until_asked(
    models: Models, certificate: ServedCertificate | None, signals: StopSignals, admission: Admission
) -> None:
    """Returns when asked to stop, the door closed. Raises ModelLoadError when there is nothing to serve after all."""
    _look_at_hang_up(models.registry, certificate)
    asked = asyncio.create_task(signals.asked.wait())
    work = asyncio.create_task(_load_and_follow(models))
    tasks = [asked, work] if certificate is None else [asked, work, asyncio.create_task(certificate.run())]
    try:
        await asyncio.wait((work, asked), return_when=asyncio.FIRST_COMPLETED)
        if work.done() and not asked.done():
            work.result()
        admission.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _look_at_hang_up(*followers: ModelRegistry | ServedCertificate | None) -> None:
    """Has the files that are followed looked at when a SIGHUP comes; where none is, that ends the server as ever."""
    present = [follower for follower in followers if follower is not None]

    def look() -> None:
        for follower in present:
            follower.look_soon()

    if present:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look)


async def _load_and_follow(models: Models) -> None:
    """Ends only with an error: ModelLoadError when no model can be loaded, and none can come by a registry; ConfigError
    when that is the configuration's fault."""
    following = asyncio.create_task(models.run())
    backends = models.backends.backends
    try:
        await models.backends.load_all()
        if models.registry is None and all(backend.error is not None for backend in backends):
            failures = "; ".join(f"{backend.id}: {backend.error}" for backend in backends)
            if all(isinstance(backend.failure, ConfigError) for backend in backends):
                # Each begins with its key: whoever has read the configuration says where that is from.
                raise ConfigError("; ".join(dict.fromkeys(str(backend.error) for backend in backends)))
            raise ModelLoadError(f"no model could be loaded: {failures}")
        await following
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _drain(admission: Admission, signals: StopSignals, timeout_s: float) -> None:
    """Lets what runs finish, for as long as it may and unless someone insists."""
    admission.close()
    logger.info("stopping: %d requests are running; waiting at most %.0f s for them", admission.running, timeout_s)
    emptied = asyncio.create_task(admission.wait_empty())
    insisted = asyncio.create_task(signals.insisted.wait())
    await asyncio.wait((emptied, insisted), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in (emptied, insisted):
        task.cancel()
    await asyncio.gather(emptied, insisted, return_exceptions=True)
    if admission.running:
        logger.warning("stopping with %d requests unfinished", admission.running)


def _announce(line: str, log_format: LogFormat) -> None:
    """Prints a line for whoever started the server, as JSON if the log is; a closed standard output is no error."""
    if log_format == "json":
        line = JsonFormatter().format(logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, (), None))
    with contextlib.suppress(OSError):
        print(line, flush=True)


def _announcing(on_event: OnEvent, log_format: LogFormat) -> OnEvent:
    """Returns an `on_event` that also prints a line for each model that is ready."""

    def note(backend: Backend, event: str) -> None:
        on_event(backend, event)
        if event == "loaded":
            _announce(_ready_line(backend), log_format)

    return note


def _ready_line(backend: Backend) -> str:
    """Such as `demo (the demo model) ready in 1.90 s on cpu: import 0.80 s, weights 0.20 s`."""
    assert backend.info is not None
    assert backend.load_s is not None
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in backend.client.phases)
    stub = " (the demo model)" if backend.source.stub else ""
    adapters = f" with {', '.join(backend.adapters)}" if backend.adapters else ""
    return f"{backend.id}{stub}{adapters} ready in {backend.load_s:.2f} s on {backend.info.device}: {phases}"
