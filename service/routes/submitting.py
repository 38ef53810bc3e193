"""What every way of creating a job has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service import lengths, masks, models
from service.errors import Conflict, InvalidInput, TooManyRequests
from service.idempotency import Claim
from service.jobs import Job, JobSpec
from service.limits import check_disk, check_model_size
from service.records import new_job_id
from service.routes.authentication import Caller
from service.routes.dependencies import Service


def check(service: Service, spec: JobSpec) -> models.Model:
    """Everything about a job that can be known without the model's weights; the model.

    Raises:
        C2IError: naming the field that is wrong.
    """
    if spec.webhook and not service.settings.webhooks:
        raise InvalidInput(
            "this service has webhooks off; leave the field out and ask with `GET /v1/jobs/{id}?wait=60`, or have its "
            "operator set C2I_WEBHOOKS=on",
            param="webhook",
        )
    model = models.resolve(service.settings.models, spec.model)
    check_model_size(model, service.settings.max_model_parameters)
    check_disk(model, service.store, service.settings.job_disk_bytes, spec.copies)
    masks.check_masks(model, spec)
    # First, as it bounds what it takes to count.
    lengths.check_total(model, spec, service.settings.max_tokens)
    lengths.check_lengths(model, spec)
    return model


def create(
    service: Service,
    caller: Caller,
    spec: JobSpec,
    claim: Claim | None,
    more: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> tuple[Job, bool]:
    """Store and queue a job that was checked; the job, and whether this request created it.

    Args:
        more: fields of the record that the route keeps beside those of every job.
        warnings: events that the job begins with.
    """
    job_id = new_job_id()
    # The URL may hold a token: workers have no use for it.
    service.store.put_input(job_id, spec.model_copy(update={"webhook": None}))
    try:
        job = service.queue.create(job_id, spec, caller.owner, claim, more, warnings)
    except (Conflict, TooManyRequests):
        service.store.discard_input(job_id)
        raise
    if job.id != job_id:  # a request with the same claim was faster
        service.store.discard_input(job_id)
    return job, job.id == job_id
