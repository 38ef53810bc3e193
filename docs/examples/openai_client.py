"""Adapt a model with OpenAI's own client: pip install openai; python openai_client.py task.jsonl MODEL"""

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

path, model = sys.argv[1:]
url = os.environ.get("C2I_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("C2I_KEY", "none is asked for on loopback"))
file = client.files.create(file=Path(path), purpose="fine-tune")
method = {"type": "compress_to_impress", "compress_to_impress": {"passes": 2}}
job = client.fine_tuning.jobs.create(model=model, training_file=file.id, method=method)
while job.status in ("queued", "running"):
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
for event in reversed(list(client.fine_tuning.jobs.list_events(job.id))):
    print(event.message)
for file_id in job.result_files:  # step_metrics.csv, adapter.zip, report.json
    client.files.content(file_id).write_to_file(client.files.retrieve(file_id).filename)
print(job.status, job.fine_tuned_model or job.error)
