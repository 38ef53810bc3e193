"""All blows, by name. Each strikes once and tells whom it hit."""

from __future__ import annotations

from tests.chaos import processes, surroundings
from tests.chaos.blow import Fault

FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        processes.kill_child,
        processes.kill_child_thrice,
        processes.kill_worker,
        processes.kill_api,
        processes.kill_redis,
        processes.kill_worker_and_redis,
        processes.power_cut,
        processes.stop_worker,
        processes.stop_everything,
        processes.freeze_worker,
        processes.freeze_worker_briefly,
        processes.silence_redis,
        processes.lose_redis,
        surroundings.fill_disk,
        surroundings.corrupt_cache,
        surroundings.drop_downloads,
        surroundings.cancel_jobs,
        surroundings.delete_jobs,
        surroundings.submit_in_an_outage,
    )
}
