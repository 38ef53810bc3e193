"""Commands for each route, which docs/api.md shows and tests/test_docs.py runs. `# 202` is the status they must get."""

from __future__ import annotations

from typing import Final

URL: Final = "http://127.0.0.1:8000"
JSON: Final = "-H 'Content-Type: application/json'"

CURLS: Final[dict[tuple[str, str], str]] = {
    ("POST", "/v1/jobs"): f"""\
curl -s {URL}/v1/jobs {JSON} -H 'Idempotency-Key: my-first-job' -d @job.json  # 202
curl -s '{URL}/v1/jobs?dry_run=true' {JSON} -d @job.json  # 200""",
    ("GET", "/v1/jobs"): f"curl -s '{URL}/v1/jobs?limit=5'  # 200",
    ("GET", "/v1/jobs/{job_id}"): f"curl -s '{URL}/v1/jobs/JOB?wait=30'  # 200",
    ("POST", "/v1/jobs/{job_id}/cancel"): f"curl -s -X POST {URL}/v1/jobs/JOB/cancel  # 200",
    ("DELETE", "/v1/jobs/{job_id}"): f"curl -s -X DELETE {URL}/v1/jobs/JOB  # 204",
    ("GET", "/v1/jobs/{job_id}/events"): f"""\
curl -s {URL}/v1/jobs/JOB/events  # 200
curl -sN {URL}/v1/jobs/JOB/events -H 'Accept: text/event-stream'  # 200""",
    ("GET", "/v1/jobs/{job_id}/report"): f"curl -s {URL}/v1/jobs/JOB/report  # 200",
    ("GET", "/v1/jobs/{job_id}/files"): f"curl -s {URL}/v1/jobs/JOB/files  # 200",
    ("GET", "/v1/jobs/{job_id}/files/{path}"): f"""\
curl -sO {URL}/v1/jobs/JOB/files/adapter/adapter_model.safetensors  # 200
curl -s -C 100 -o rest.bin {URL}/v1/jobs/JOB/files/adapter/adapter_model.safetensors  # 206""",
    ("GET", "/v1/jobs/{job_id}/adapter.zip"): f"curl -sO {URL}/v1/jobs/JOB/adapter.zip  # 200",
    ("GET", "/v1/jobs/{job_id}/quantized.zip"): f"curl -sO {URL}/v1/jobs/JOB/quantized.zip  # 200",
    ("GET", "/v1/jobs/{job_id}/model.zip"): f"curl -sO {URL}/v1/jobs/JOB/model.zip  # 200",
    ("GET", "/v1/jobs/{job_id}/factored.zip"): f"curl -sO {URL}/v1/jobs/JOB/factored.zip  # 200",
    ("POST", "/v1/jobs/{job_id}/tries"): f"""\
TRY=$(curl -s {URL}/v1/jobs/JOB/tries {JSON} -d '{{"prompt": "The capital of France is", "max_tokens": 8}}' \\
  | grep -o 'try_[0-9a-z]*')  # 202""",
    ("GET", "/v1/jobs/{job_id}/tries/{try_id}"): f'curl -s "{URL}/v1/jobs/JOB/tries/$TRY?wait=20"  # 200',
    ("GET", "/v1/service"): f"curl -s {URL}/v1/service  # 200",
    ("GET", "/v1/models"): f"curl -s {URL}/v1/models  # 200",
    ("GET", "/healthz"): f"curl -s {URL}/healthz  # 200",
    ("GET", "/readyz"): f"curl -s {URL}/readyz  # 200",
    ("GET", "/v1/workers"): f"curl -s {URL}/v1/workers  # 200",
    ("GET", "/metrics"): f"curl -s {URL}/metrics  # 200",
    ("POST", "/v1/files"): f"""\
FILE=$(curl -s {URL}/v1/files -F purpose=fine-tune -F file=@task.jsonl | grep -o 'file-[0-9a-z]*')  # 200""",
    ("GET", "/v1/files"): f"curl -s '{URL}/v1/files?limit=5'  # 200",
    ("GET", "/v1/files/{file_id}"): f"curl -s {URL}/v1/files/$FILE  # 200",
    ("DELETE", "/v1/files/{file_id}"): f"curl -s -X DELETE {URL}/v1/files/$FILE  # 200",
    ("GET", "/v1/files/{file_id}/content"): f"curl -s -o adapter.zip {URL}/v1/files/file-JOB-adapter/content  # 200",
    ("POST", "/v1/fine_tuning/jobs"): f"""\
curl -s {URL}/v1/fine_tuning/jobs {JSON} \\
  -d '{{"model": "smollm2-135m-instruct", "training_file": "file-JOB-examples"}}'  # 200""",
    ("GET", "/v1/fine_tuning/jobs"): f"curl -s '{URL}/v1/fine_tuning/jobs?limit=5'  # 200",
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): f"curl -s {URL}/v1/fine_tuning/jobs/JOB  # 200",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): f"curl -s -X POST {URL}/v1/fine_tuning/jobs/JOB/cancel  # 200",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): f"""\
curl -s {URL}/v1/fine_tuning/jobs/JOB/events  # 200
curl -sN '{URL}/v1/fine_tuning/jobs/JOB/events?stream=true'  # 200""",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): f"curl -s {URL}/v1/fine_tuning/jobs/JOB/checkpoints  # 200",
}
