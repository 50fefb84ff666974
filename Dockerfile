# The CPU server with the shipped models; serves at once:
#   docker build -t godwit . && docker run --rm -p 127.0.0.1:50051:50051 godwit
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY dev .
RUN ./dev deps
COPY . .
RUN ./dev test && cmake --install build/cpu --prefix /usr/local --strip

FROM ${BASE_IMAGE}
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends \
      libssl3 libsentencepiece0 libprometheus-cpp-pull1.0 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old \
      /var/log/apt /var/log/dpkg.log /usr/share/doc/*
COPY --from=build /usr/local/lib/godwit/ /usr/local/lib/godwit/
ENV PATH=/usr/local/lib/godwit:/usr/local/bin:/usr/bin:/bin
COPY models/ /models/
# A number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 65532:65532
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
  CMD ["godwit", "health", "--server", "127.0.0.1:50051"]
ENTRYPOINT ["godwit"]
# Plain text inside the container network; publish the port on loopback or add --tls-cert and
# --tls-key instead of --insecure.
CMD ["serve", "--model", "/models/godwit-tale", "--listen", "0.0.0.0:50051", \
     "--metrics-listen", "0.0.0.0:9464", "--insecure"]
