# The gateway: one replica, one process. It needs /config (read-only) and /spool (a volume of its own), see compose.yaml.

FROM python:3.11-slim AS build
RUN python -m venv /venv
COPY requirements.lock /
# Hashes are checked for every package; --only-binary keeps compilers and build scripts out.
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: \
      --requirement /requirements.lock \
 && /venv/bin/pip uninstall --yes pip setuptools
COPY app /gateway/app
RUN printf '#!/bin/sh\nexec python -m app.cli "$@"\n' > /venv/bin/gateway \
 && chmod 755 /venv/bin/gateway \
 && python -m compileall -q /gateway/app

FROM python:3.11-slim
# A number, not a name: Kubernetes checks runAsNonRoot by it. A new volume on /spool takes over the folder's owner.
RUN groupadd --gid 10001 gateway \
 && useradd --uid 10001 --gid gateway --no-create-home --home-dir / --shell /usr/sbin/nologin gateway \
 && install --directory --owner gateway --group gateway --mode 700 /spool
COPY --from=build /venv /venv
COPY --from=build /gateway /gateway
ENV PATH=/venv/bin:$PATH PYTHONPATH=/gateway PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /
# 8080: calls and health. 9090: metrics and status, for the inside only.
EXPOSE 8080 9090
ENTRYPOINT ["gateway"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080", "--admin-port", "9090", "--config", "/config", "--environment", "prod", "--spool-dir", "/spool"]
