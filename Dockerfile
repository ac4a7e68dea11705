# The service as a container: docker build -t modeclip . && docker run -p 8080:8080 -v ./runs/demo:/data modeclip /data
# The folder must be writable for user 10001 where its index is still to be built. pip's own settings are build arguments:
# with a PIP_EXTRA_INDEX_URL of PyTorch's CPU wheels the image has a quarter of the size.
FROM python:3.11-slim-bookworm AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[serve,search,demo]"

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 modeclip
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
USER 10001
WORKDIR /home/modeclip
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s --timeout=5s CMD python -c "import urllib.request as web; web.urlopen('http://127.0.0.1:8080/health')"
ENTRYPOINT ["modeclip", "serve", "--host", "0.0.0.0"]
