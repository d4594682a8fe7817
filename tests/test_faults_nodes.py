"""Machines that are lost: a head without CPUs and two nodes with one each, as processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import journal, settings, unlearn
from tests import faults
from tests.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    small: Any = {"object_store_memory": 80_000_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_health_check_period_ms", "500")  # a lost node is noticed in seconds
        patch.setenv("RAY_health_check_failure_threshold", "4")
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        found.add_node(num_cpus=1, **small)
        found.add_node(num_cpus=1, **small)
        ray.init(address=found.address, log_to_driver=False, configure_logging=False)
        ray.cloudpickle.register_pickle_by_value(faults)
        yield found
        ray.shutdown()
        found.shutdown()


class Loss(threading.Thread):
    """Takes the node of a worker away once the run has reached a step; puts another in its place where asked to."""

    def __init__(self, cluster: Any, folder: Path, step: int, replace: bool) -> None:
        super().__init__(daemon=True)
        self.cluster, self.folder, self.step, self.replace = cluster, folder, step, replace
        self.done = False

    def run(self) -> None:
        faults.wait(lambda: faults.reached(self.folder, self.step))
        node = next(iter(self.cluster.worker_nodes))
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        self.cluster.worker_nodes.remove(node)
        if self.replace:
            time.sleep(3)  # the run has to wait
            self.cluster.add_node(wait=False, num_cpus=1, object_store_memory=80_000_000)
        self.done = True


def lose_a_node(
    patch: pytest.MonkeyPatch, study: Study, cluster: Any, folder: Path, replace: bool, *given: str
) -> None:
    loss = Loss(cluster, folder, 6, replace)
    loss.start()
    patch.setattr(unlearn.worker, "task", faults.planned(faults.slowly(12), folder.parent / "marks"))
    unlearn.run(study.load(folder, *faults.STEPS, "train.workers=2", *given), say=lambda line: None)
    assert loss.done
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, faults.store_of(study))


def test_a_lost_node_is_waited_for_or_done_without(
    monkeypatch: pytest.MonkeyPatch, study: Study, cluster: Any, tmp_path: Path
) -> None:
    """First a replacement comes: bit for bit the undisturbed run. Then none does, and one worker goes on alone."""
    assert "RAY_ADDRESS" not in os.environ
    calm = tmp_path / "calm"
    unlearn.run(study.load(calm, *faults.STEPS, "train.workers=2"), say=lambda line: None)

    waited = tmp_path / "waited" / "run"
    lose_a_node(monkeypatch, study, cluster, waited, True)
    assert faults.same_weights(calm, waited)
    assert journal.load(waited).notes == ("started again with 2 workers, from step 4 on",)

    alone = tmp_path / "alone" / "run"
    lose_a_node(monkeypatch, study, cluster, alone, False, "train.min_workers=1")
    start = Path(settings.load(str(alone / "config.yaml")).model.path)
    assert 0 < faults.distance(alone, calm, start) < 1e-4
    assert journal.load(alone).notes[-1].startswith("started again, from step ")
