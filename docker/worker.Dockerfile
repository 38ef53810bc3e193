# One worker, with CUDA. Build from the project's root:
#   docker build -f docker/worker.Dockerfile -t c2i-worker .
# Never built where this project is tested: there is neither a Docker engine nor a GPU there.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --create-home --uid 1000 c2i \
    && mkdir /data && chown c2i /data
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY service service
COPY workers workers
# torch's own wheels bring the CUDA libraries that fit them; the image brings the driver's side.
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir -c constraints.txt '.[worker,quantize]'
USER c2i
ENV PATH=/venv/bin:$PATH C2I_DATA=/data
CMD ["c2i", "worker"]
