# One image for every process of the service: Spark master and worker, stream, training, dashboard, gateway, and the
# command line.
FROM python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1 AS base
# Debian keeps only the latest build of a package, so versions cannot be pinned; the base image is.
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
# Copy the lock file first, so that a change of the code does not reinstall two gigabytes of packages.
COPY requirements.lock ./
RUN pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY imagestream imagestream
COPY models models
COPY producer producer
COPY streaming streaming
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation .
# Verified by SHA-256 against streaming/platform/jars.lock; containers download nothing at start.
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
