"""Machines that are lost: a head without CPUs and two nodes with one each, as processes of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import journal, settings, unlearn
from tests import faults
from tests.conftest import ask_for_tokens
from tests.faults import Fault
from tests.ray_head import Head, start_node
from tests.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, list[Any], ExitStack]]:
    """The address of the cluster, its nodes with CPUs, and where further ones are ended."""
    import ray
    from ray.cluster_utils import Cluster

    small: Any = {"object_store_memory": 80_000_000}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        faults.switches(patch)
        ask_for_tokens("disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        stack.callback(cluster.shutdown)
        found = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        stack.callback(ray.shutdown)
        ray.cloudpickle.register_pickle_by_value(faults)
        yield cluster.address, found, stack


class Loss(threading.Thread):
    """Takes a machine away while both workers are in step 7; puts another in its place where asked to."""

    PLAN = (Fault("step", 7, rank=0, how="hold"), Fault("step", 7, rank=1, how="hold"))

    def __init__(self, nodes: list[Any], address: str, folder: Path, replace: bool, stack: ExitStack) -> None:
        super().__init__(daemon=True)
        self.nodes, self.address, self.folder, self.replace, self.stack = nodes, address, folder, replace, stack
        self.marks = folder.parent / "marks"
        self.done = False

    def run(self) -> None:
        faults.wait(lambda: all((self.marks / fault.name).exists() for fault in self.PLAN))
        raylet = psutil.Process(self.nodes.pop().all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # a worker whose raylet is gone leaves by itself
                process.kill()
        (self.marks / faults.GO).touch()
        if self.replace:
            time.sleep(3)  # the run has to wait
            self.stack.enter_context(start_node(Head("", self.address, {})))
        self.done = True


def lose_a_node(patch: pytest.MonkeyPatch, study: Study, loss: Loss, *given: str) -> None:
    folder = loss.folder
    loss.start()
    patch.setattr(unlearn.worker, "task", faults.planned(loss.PLAN, loss.marks))
    unlearn.run(study.load(folder, *faults.STEPS, "train.workers=2", *given), say=lambda line: None)
    loss.join(120)
    assert loss.done
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, faults.store_of(study))


def test_a_lost_node_is_waited_for_or_done_without(
    monkeypatch: pytest.MonkeyPatch, study: Study, nodes: tuple[str, list[Any], ExitStack], tmp_path: Path
) -> None:
    """First a replacement comes: bit for bit the undisturbed run. Then none does, and one worker goes on alone."""
    address, mine, stack = nodes
    calm = tmp_path / "calm"
    unlearn.run(study.load(calm, *faults.STEPS, "train.workers=2"), say=lambda line: None)

    waited = tmp_path / "waited" / "run"
    lose_a_node(monkeypatch, study, Loss(mine, address, waited, True, stack))
    assert faults.same_result(calm, waited)
    assert journal.load(waited).notes == ("started again with 2 workers, from step 4 on",)

    alone = tmp_path / "alone" / "run"
    lose_a_node(monkeypatch, study, Loss(mine, address, alone, False, stack), "train.min_workers=1")
    start = Path(settings.load(str(alone / "config.yaml")).model.path)
    assert 0 < faults.distance(alone, calm, start) < 1e-4
    assert journal.load(alone).notes[-1].startswith("started again, from step ")
