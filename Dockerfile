# docker build -t xl2jax .
# docker run --rm --gpus all -v "$PWD":/data -v xl2jax-cache:/home/user/.cache xl2jax \
#     infer --checkpoint BAAI/Video-XL-2 --video /data/talk.mp4 --question "What is the talk about?"
#
# CUDA's libraries come with JAX's own packages; the host needs an NVIDIA driver (525 or newer) and the container toolkit.
FROM python:3.12-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 1000 user \
    && mkdir -p /home/user/.cache \
    && chown user:user /home/user/.cache

WORKDIR /app

# The dependencies change less often than the code: they have a layer of their own.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir xl2jax \
    && touch xl2jax/__init__.py \
    && pip install -c constraints.txt '.[cuda12]' \
    && pip uninstall --yes xl2jax

# Editable, so that the bundled checkpoint is found beside the package.
COPY . .
RUN pip install --no-deps -c constraints.txt -e .

USER 1000
VOLUME ["/home/user/.cache"]
ENTRYPOINT ["xl2jax"]
CMD ["--help"]
