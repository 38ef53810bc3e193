# The API alone: no torch, about a tenth of the worker's size. Build from the project's root:
#   docker build -f docker/service.Dockerfile -t c2i-service .
# Never built where this project is tested: there is no Docker engine there. Take it as a starting point.
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY service service
COPY workers workers
RUN pip install --no-cache-dir -c constraints.txt . && useradd --create-home --uid 1000 c2i && mkdir /data && chown c2i /data
USER c2i
ENV C2I_DATA=/data C2I_HOST=0.0.0.0 C2I_PORT=8000
EXPOSE 8000
CMD ["c2i", "serve", "--workers", "0"]
