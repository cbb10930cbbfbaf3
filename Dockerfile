# EvoP in a container: `docker build -t evop .`, then `docker run -p 8000:8000 evop`. See docs/deploy.md.
#
# The final image holds one binary, which has the bundled model inside. It runs as uid 65532 and writes to /data and /tmp
# only, so the root file system can be read-only.
#
# A CUDA build needs two other images, one with Rust and nvcc and one with CUDA's libraries:
#   --build-arg CARGO_FEATURES=cuda --build-arg RUST_IMAGE=... --build-arg RUNTIME_IMAGE=...
ARG RUST_IMAGE=docker.io/library/rust:1-bookworm
ARG RUNTIME_IMAGE=docker.io/library/debian:bookworm-slim

# ---- build -------------------------------------------------------------------------------------------------------------
FROM ${RUST_IMAGE} AS build
WORKDIR /src

# The dependencies are a layer of their own: manifests and empty crates, rebuilt only when a manifest or the lock changes.
COPY Cargo.toml Cargo.lock ./
COPY crates/model/Cargo.toml crates/model/Cargo.toml
COPY crates/pruning/Cargo.toml crates/pruning/Cargo.toml
COPY crates/serving/Cargo.toml crates/serving/Cargo.toml
COPY server/Cargo.toml server/Cargo.toml
ARG CARGO_FEATURES=""
RUN mkdir -p crates/model/src crates/pruning/src crates/serving/src server/src \
 && touch crates/model/src/lib.rs crates/pruning/src/lib.rs crates/serving/src/lib.rs \
 && echo 'fn main() {}' > server/src/main.rs \
 && cargo build --release --locked --package evop-server --bin evop --features "${CARGO_FEATURES}" \
 && rm -r crates/*/src server/src

COPY crates crates
COPY server server
COPY models/tiny models/tiny
# A copied file keeps its age, which may be more than that of the empty crates: cargo has to see it as the newer one.
RUN find crates server -name '*.rs' -exec touch {} + \
 && cargo build --release --locked --package evop-server --bin evop --features "${CARGO_FEATURES}" \
 && install -D --strip target/release/evop /out/evop

# ---- run ---------------------------------------------------------------------------------------------------------------
FROM ${RUNTIME_IMAGE}

ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="evop" \
      org.opencontainers.image.description="Prunes large language models and serves them behind an OpenAI-compatible API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Certificates, to fetch models from the hub over TLS.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/evop /usr/local/bin/evop
RUN install --directory --owner=65532 --group=65532 --mode=0755 /data

# HOME is for what libraries keep by themselves, CUDA's kernel cache among it.
ENV EVOP_DATA_DIR=/data \
    HF_HOME=/data/huggingface \
    HOME=/data
VOLUME ["/data"]
WORKDIR /data
USER 65532:65532

# 8000 is the public API. 8001 is the admin API, which listens on loopback until EVOP_ADMIN_ADDR says otherwise.
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["evop", "health"]
ENTRYPOINT ["evop"]
CMD ["serve", "--host", "0.0.0.0"]
