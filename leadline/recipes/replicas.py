"""Replicas of a server, as actors of Ray Serve: on this machine, or on all machines of a Ray cluster.

Ray places the replicas, watches over them and starts another where one has died. The relay in front of them
(`serve/relay.py`) runs in this process, and decides by `ranked` which replica a call goes to. This is the only file
that knows of Ray; it comes with the extra `ray`.

Whoever can speak to Ray can run programs, and Ray listens on all of a machine's addresses. So `leadline serve`
gives what it starts a token that nobody else has (`recipes/serve.py`, before Ray is imported); a cluster was started by
others, and has the token or the network that they gave it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.types import Message

from leadline.serve.app import create_app
from leadline.serve.relay import Call, ReplicaLost, ranked
from leadline.serve.service import Service

_UNLIMITED = 100_000  # a replica refuses in its own words what is too much; Ray's queue would say nothing
_HEALTH_S = 2.0
_OBJECT_STORE_BYTES = 512 * 2**20  # only bodies of requests are large enough to pass through it
_NAME = "leadline"


class ReplicasError(ValueError):
    """Replicas that cannot be started; one line that says why."""


class Replica:
    """A complete server without a port; it lives in an actor."""

    async def __init__(self, make_service: Callable[[], Service]):
        self._service = await asyncio.to_thread(make_service)
        self._app = create_app(self._service)
        self._service.worker.start()

    async def answer(self, call: Call, affinity: str) -> AsyncGenerator[list[Message], None]:
        """ASGI messages of an answer, as many at once as there are. affinity: read by the router."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await self._app(call.scope(), receive, messages.put)
            finally:
                messages.put_nowait(None)

        working = asyncio.create_task(work())
        try:
            ended = False
            while not ended:
                ready = [await messages.get()]
                while not messages.empty():
                    ready.append(messages.get_nowait())
                ended = ready[-1] is None
                if batch := [message for message in ready if message is not None]:
                    yield batch
            await working
        finally:
            gone.set()
            with suppress(asyncio.CancelledError):
                await working

    async def metrics(self) -> tuple[str, str]:
        """Name and metrics of this replica."""
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.text().decode()

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica whose engine has stopped."""
        if self._service.worker.failure is not None:
            raise RuntimeError(self._service.worker.failure)


class Router(RequestRouter):
    """Asks `ranked`. It is told of every call's beginning and end, so it knows how much each replica has to do."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._busy: int = kwargs["busy"]
        self._open: defaultdict[str, set[str]] = defaultdict(set)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        affinity = pending_request.kwargs.get("affinity", "") if pending_request else ""
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        order = ranked(affinity, {name: len(self._open[name]) for name in replicas}, self._busy)
        return [[replicas[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._open[replica_id.unique_id].add(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._open[replica_id.unique_id].discard(internal_request_id)


class RayReplicas:
    """The replicas of a deployment, as the relay sees them."""

    def __init__(self, handle: DeploymentHandle[Any]):
        self._handle = handle

    async def answer(self, call: Call, affinity: str) -> AsyncGenerator[Message, None]:
        response = self._handle.options(stream=True).answer.remote(call, affinity=affinity)
        try:
            async for batch in response:
                for message in batch:
                    yield message
        except (RayActorError, RayServeException) as error:
            raise ReplicaLost(str(error)) from error
        finally:
            response.cancel()

    async def metrics(self) -> Mapping[str, str]:
        try:
            return dict(await self._handle.broadcast("metrics").results_async(timeout_s=5))
        except (RayError, TimeoutError):
            return {}  # one is dying at this moment


@contextmanager
def running_replicas(
    make_service: Callable[[], Service], count: int, *, busy: int, gpus: int, grace_s: float, cluster: str
) -> Iterator[RayReplicas]:
    """`count` replicas, each with `gpus` GPUs to itself, all of them ready; they end with the block.

    busy: calls from which on a replica's own calls may go elsewhere. cluster: address of a Ray cluster whose machines
    have the same packages and the checkpoint at the same path; empty: this machine. Raises ReplicasError.
    """
    _connect(count, cluster)
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        deployment = serve.deployment(
            name=_NAME,
            num_replicas=count,
            max_ongoing_requests=_UNLIMITED,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
            health_check_period_s=_HEALTH_S,
            graceful_shutdown_timeout_s=grace_s,
            max_constructor_retry_count=1,
            request_router_config=RequestRouterConfig(
                request_router_class=Router, request_router_kwargs={"busy": busy}
            ),
        )(Replica)
        try:
            handle = serve.run(deployment.bind(make_service), name=_NAME, route_prefix=None)
        except RuntimeError as error:
            raise ReplicasError(f"the replicas did not start: {_last_line(error)}") from error
        yield RayReplicas(handle)
    finally:
        if cluster:
            serve.delete(_NAME)  # what else is served there goes on
        ray.shutdown()


def _connect(count: int, cluster: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": _NAME}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        if cluster:
            ray.init(cluster, **quiet)
        else:
            ray.init(
                "local",
                num_cpus=max(count, os.cpu_count() or 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ReplicasError(f"cluster={cluster}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
