# The same image as `make image`, for those who build with docker:
#   docker build -t sidestep .
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
        clang-14 gcc libc6-dev libelf-dev make pkg-config zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make build && cp target/*-unknown-linux-gnu/release/sidestep /sidestep

FROM scratch
COPY --from=build /sidestep /sidestep
ENTRYPOINT ["/sidestep"]
