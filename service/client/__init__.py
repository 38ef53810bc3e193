"""A client of the service, blocking (`Client`) or asynchronous (`AsyncClient`):

    from service.client import Client

    examples = [
        {"prompt": f"{n} is even:", "completion": " no" if n % 2 else " yes", "choices": [" yes", " no"]}
        for n in range(40)
    ]
    with Client("http://127.0.0.1:8000") as client:
        job = client.submit({"model": "smollm2-135m-instruct", "examples": examples})
        for event in client.events(job.id):
            print(f"{event.progress.percent:5.1f} %  {event.message}")
        job = client.wait(job.id, timeout=3600)
        print(job.result.verdict if job.result else job.error)
        if job.result:
            client.download(job.id, job.id, only=("adapter/", "report.json"))

`AsyncClient` has the same methods, to be awaited; `events` and `jobs` are for `async for`. Errors are those of
`service.errors`: what the service refuses is raised as it was raised there, and `Unavailable` where it does not answer.
"""

from service.client.asynchronous import AsyncClient
from service.client.blocking import Client

__all__ = ["AsyncClient", "Client"]
