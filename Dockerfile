# One image for every process of the service: Spark master and worker, stream, training, dashboard, gateway, and the
# command line.
FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1 AS base
# Debian keeps only the latest build of a package, so its versions cannot be pinned; the base image's tag is.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openjdk-17-jre-headless procps \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    IMAGESTREAM_JARS=/opt/imagestream/jars \
    IMAGESTREAM_BACKBONES=/opt/imagestream/backbones


FROM base AS build
WORKDIR /src
RUN python -m venv /opt/venv
# The lock first: a change of our own code does not install two gigabytes anew.
COPY requirements.lock ./
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY imagestream imagestream
COPY models models
COPY producer producer
COPY streaming streaming
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation .
# Checked by SHA-256 against streaming/platform/jars.lock; a container fetches nothing when it starts.
# hadolint ignore=DL3059
RUN imagestream --home /opt/imagestream setup


FROM base
RUN useradd --create-home --uid 10001 imagestream \
    && install -d -o imagestream -g imagestream /data /scrape /opt/imagestream/backbones \
    && install -d -o imagestream -g imagestream -m 700 /secrets /etc/spark
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=imagestream:imagestream /opt/imagestream/jars /opt/imagestream/jars
COPY --from=build --chown=imagestream:imagestream /opt/imagestream/backbones /opt/imagestream/backbones
ENV IMAGESTREAM_HOME=/data
USER 10001
WORKDIR /data
VOLUME /data
# Spark on Kubernetes starts its executors with the argument `executor`, which is one of the commands.
ENTRYPOINT ["imagestream"]
CMD ["--help"]
