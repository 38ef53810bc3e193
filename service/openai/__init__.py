"""What OpenAI's `/v1/files` and `/v1/fine_tuning/jobs` say, said of our jobs (docs/openai.md).

https://platform.openai.com/docs/api-reference/fine-tuning
"""
