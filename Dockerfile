FROM python:3.13-slim
ENV PYTHONUNBUFFERED=1
WORKDIR /app
RUN useradd --create-home cerberus

COPY requirements.txt .
RUN pip install --no-cache-dir --only-binary=:all: --require-hashes -r requirements.txt

COPY models models
# Writable: `features apply` leaves feature_store.yaml there.
COPY --chown=cerberus feature_repo feature_repo
COPY cerberus cerberus
RUN python -m compileall -q cerberus

USER cerberus
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
CMD ["uvicorn", "cerberus.app:app", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "15", "--timeout-keep-alive", "75"]
