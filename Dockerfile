# syntax=docker/dockerfile:1
# One binary, no shell, no root. `make docker-build IMAGE=name:tag`; without Docker: `make image`.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY . .
# TAGS= (empty) includes the commands of the demo.
ARG TARGETOS TARGETARCH VERSION=unknown TAGS=nodemo
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -tags "$TAGS" -trimpath -buildvcs=false -ldflags "-s -w -X github.com/whatsapp-operator/whatsapp-operator/internal/app.Version=$VERSION" -o /whatsapp-operator .

# CA certificates, time zones and a user; nothing to run but ours.
FROM gcr.io/distroless/static:nonroot
ARG VERSION=unknown REVISION=unknown
# The binary contains libsignal (GPL-3.0): see NOTICE.
LABEL org.opencontainers.image.licenses="GPL-3.0-only" \
      org.opencontainers.image.title="whatsapp-operator" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="https://github.com/whatsapp-operator/whatsapp-operator"
COPY LICENSE NOTICE /licenses/
COPY --from=build /whatsapp-operator /whatsapp-operator
USER 65532:65532
ENTRYPOINT ["/whatsapp-operator"]
