# Two images from one file: `--target cpu` (the default, last) and `--target gpu`. Neither holds torch, a compiler or pip's
# cache: the build stages install into /opt/vaeserve, and only that folder and the bundles reach the final stages.
#
#   docker build --tag vaeserve:cpu .
#   docker run --read-only --publish 8000:8000 vaeserve:cpu
#   docker run --read-only --publish 8000:8000 --volume "$PWD/exported:/srv/exported:ro" vaeserve:cpu
#   docker run --read-only --publish 8000:8000 --env VAESERVE_WORKERS=auto vaeserve:cpu
#   docker build --tag vaeserve:gpu --target gpu . && docker run --gpus all --read-only --publish 8000:8000 vaeserve:gpu

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# --- the project as a wheel -----------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md ./
COPY service service
COPY training training
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# --- build: a virtual environment without pip in it, filled by the base image's pip; its core dependencies come first and
# from pyproject.toml alone, so that a change of code does not install them again ---------------------------------------
FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml deploy/constraints.txt ./
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > core.txt \
 && python3 -m venv --without-pip /opt/vaeserve \
 && python3 -m pip --python /opt/vaeserve/bin/python install --no-cache-dir --constraint constraints.txt --requirement core.txt \
 && find /opt/vaeserve -type d -name tests -path '*/numpy/*' -prune -exec rm -rf {} +

# What ONNX Runtime ships for converting models is not needed to run them.
FROM build AS build-cpu
COPY --from=wheel /wheel /wheel
RUN python3 -m pip --python /opt/vaeserve/bin/python install --no-cache-dir --constraint constraints.txt "$(ls /wheel/*.whl)[cpu]" \
 && cd /opt/vaeserve/lib/python3*/site-packages/onnxruntime && rm -rf transformers quantization tools

FROM build AS build-gpu
COPY --from=wheel /wheel /wheel
RUN python3 -m pip --python /opt/vaeserve/bin/python install --no-cache-dir --constraint constraints.txt "$(ls /wheel/*.whl)[gpu]" \
 && cd /opt/vaeserve/lib/python3*/site-packages/onnxruntime && rm -rf transformers quantization tools

# --- what both images are -------------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS runtime
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vaeserve" \
      org.opencontainers.image.description="Serves latent variable models of images: latents, samples, calibrated anomaly scores" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/vaeserve/bin:/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VAESERVE_REPOSITORY=/srv/exported \
    VAESERVE_HOST=0.0.0.0 \
    VAESERVE_PORT=8000
# Package lists, archives, manuals and translations, where the base image has any left. The last step that needs root.
RUN rm -rf /var/lib/apt/lists/* /var/cache/apt/* /usr/share/man/* /usr/share/locale/*
WORKDIR /srv
# A number, not a name, so that Kubernetes' runAsNonRoot can see that it is not root. Nothing in the image belongs to it.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client and not urllib: a proxy set in the environment must not be asked for 127.0.0.1.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['VAESERVE_PORT']), timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["vaeserve"]
CMD ["serve"]

# --- gpu: CUDA and cuDNN come from their own wheels (onnxruntime-gpu[cuda,cudnn]); the host brings only its driver -----
FROM runtime AS gpu
ENV VAESERVE_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/vaeserve /opt/vaeserve
COPY exported /srv/exported

# --- cpu, the default ---------------------------------------------------------------------------------------------------
FROM runtime AS cpu
ENV VAESERVE_DEVICE=cpu
COPY --from=build-cpu /opt/vaeserve /opt/vaeserve
COPY exported /srv/exported
