# The two commands to begin with: `make demo` and `make test`. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CONTROLLER_GEN := go run sigs.k8s.io/controller-tools/cmd/controller-gen@v0.23.0
GOLANGCI_LINT := bin/golangci-lint
BINARY := bin/whatsapp-operator

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/whatsapp-operator/whatsapp-operator/internal/app.Version=$(VERSION)
IMAGE ?= whatsapp-operator:$(VERSION)
ARGS ?=
# The time that a package may take before `go test` prints every goroutine and stops.
TEST_TIMEOUT ?= 20m
FUZZ_TIME ?= 10s

# Only for the targets that start an API server: to find or build it may take minutes.
assets = KUBEBUILDER_ASSETS="$$(hack/envtest-assets)"

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Use

.PHONY: demo
demo: build ## Run everything on this machine with simulated phones (ARGS="--sessions=3 --exit")
	@$(assets) && export KUBEBUILDER_ASSETS && exec $(BINARY) demo $(ARGS)

.PHONY: build
build: ## Build bin/whatsapp-operator
	CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)" -o $(BINARY) .

.PHONY: image
image: ## Build the container images as archives, without a container engine (dist/)
	mkdir -p dist
	cd hack/image && go run . -root ../.. -version $(VERSION) -o ../../dist/whatsapp-operator.tar
	cd hack/image && go run . -root ../.. -version $(VERSION) -demo -o ../../dist/whatsapp-operator-demo.tar

.PHONY: docker-build
docker-build: ## Build the container image with Docker (IMAGE=name:tag)
	docker build --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) -t $(IMAGE) .

.PHONY: install-yaml
install-yaml: ## Write dist/install.yaml: config/default as one file
	mkdir -p dist
	cd hack/chart && go run . install > ../../dist/install.yaml

##@ Check

.PHONY: test
test: test-deps ## Run every test, with the race detector, against a real API server, Redis and PostgreSQL
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go test -race -timeout $(TEST_TIMEOUT) ./...

.PHONY: test-one
test-one: test-deps ## Run the tests of one package (PKG=./internal/batch RUN=TestName)
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go test -race -timeout $(TEST_TIMEOUT) -count=1 -v -run '$(or $(RUN),.)' $(or $(PKG),$(error PKG is not set; for example PKG=./internal/batch))

.PHONY: test-chart
test-chart: ## Check the chart: lint, every set of options, refused values, Kustomize, health for Argo CD and Flux
	cd hack/chart && go test -count=1 ./...
	cd hack/image && go test -count=1 ./...

.PHONY: test-faults
test-faults: test-deps ## Run every named fault, and check that no session is lost or doubled (RUN=TestFaults//SIGKILL; half an hour)
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go test -race -tags faults -timeout 90m -count=1 -v -run '$(or $(RUN),.)' ./internal/faults -args $(ARGS)

.PHONY: test-faults-smoke
test-faults-smoke: test-deps ## Run the faults that no other test replaces, about 6 minutes (internal/faults lists them)
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go test -race -tags faults -timeout 20m -count=1 -v -run TestFaults ./internal/faults -args -smoke $(ARGS)

.PHONY: test-chaos
test-chaos: test-deps ## Run random faults for MINUTES; the same SEED gives the same faults
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go test -race -tags faults -timeout 24h -count=1 -v -run TestRandomWalk ./internal/faults \
		-args -walk=$(or $(MINUTES),20)m $(ARGS)

.PHONY: e2e
e2e: ## Install, upgrade, and disturb a release in the cluster of KUBECONFIG (bench/results/e2e.json; CONTRIBUTING.md has the variables)
	go test -tags e2e -timeout 120m -count=1 -v -run '$(or $(RUN),.)' ./internal/e2e -args -out=$(if $(RUN),,$(CURDIR)/bench/results/e2e.json) $(ARGS)

.PHONY: e2e-smoke
e2e-smoke: ## The part of it that .ci/run waits for, about 5 minutes
	go test -tags e2e -timeout 30m -count=1 -v -run '$(or $(RUN),.)' ./internal/e2e -args -smoke $(ARGS)

.PHONY: test-upgrade
test-upgrade: test-deps ## Upgrade from another commit, go back, and upgrade again: no phone may scan (FROM=COMMIT SESSIONS=50)
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go run ./bench/upgrade \
		-from=$(or $(FROM),$(error FROM is not set; for example FROM=2f1be94, which has the WhatsApp client of December 2025)) \
		-sessions=$(or $(SESSIONS),50) $(ARGS)

.PHONY: whatsmeow
whatsmeow: ## Print which version of the WhatsApp client library is used, its age, and which newer one others use
	@go run ./hack/whatsmeow

.PHONY: test-deps
test-deps: ## Install the servers that the tests start (redis-server, PostgreSQL, PgBouncer)
	@hack/install-test-deps

.PHONY: fuzz
fuzz: ## Run every fuzz test for FUZZ_TIME each
	@hack/fuzz $(FUZZ_TIME)

.PHONY: lint
lint: $(GOLANGCI_LINT) ## Run golangci-lint with .golangci.yml
	$(GOLANGCI_LINT) run ./...
	cd hack/chart && $(abspath $(GOLANGCI_LINT)) run ./...
	cd hack/image && $(abspath $(GOLANGCI_LINT)) run ./...

.PHONY: vet
vet: ## Run go vet
	go vet -tags faults,e2e ./...
	go vet -tags nodemo . ./internal/app

.PHONY: fmt
fmt: $(GOLANGCI_LINT) ## Format the code
	$(GOLANGCI_LINT) fmt ./...

$(GOLANGCI_LINT): hack/golangci/go.mod hack/golangci/go.sum hack/golangci/main.go
	@echo "building golangci-lint with kube-api-linter (two minutes the first time)" >&2
	cd hack/golangci && CGO_ENABLED=0 GOFLAGS=-mod=readonly GOWORK=off go build -trimpath \
		-ldflags "-s -w -X main.version=$$(go list -m -f '{{.Version}}' github.com/golangci/golangci-lint/v2)" -o $(CURDIR)/$@ .

.PHONY: check-generated
check-generated: generate manifests docs ## Fail if generated files differ from what the generators write
	git diff --exit-code -- api config charts docs/reference.md
	@test -z "$$(git status --porcelain -- api config charts docs/reference.md)" || { git status --short -- api config charts docs/reference.md; echo "check-generated: not committed" >&2; exit 1; }

##@ Measure

.PHONY: bench
bench: bench-delivery bench-messages bench-worker bench-failover bench-scale ## Run every benchmark

.PHONY: bench-delivery
bench-delivery: test-deps ## Requests and latency at Laravel, compared with the old system (bench/results/delivery.json)
	go run ./bench/delivery $(ARGS)

.PHONY: bench-messages
bench-messages: test-deps ## How messages reach Laravel, and a backlog of 100,000 (bench/results/messages.json)
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go run ./bench/messages $(ARGS)

.PHONY: bench-worker
bench-worker: test-deps ## A worker's memory and CPU, compared with bare clients (bench/results/worker.json)
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go run ./bench/worker $(ARGS)

.PHONY: bench-failover
bench-failover: test-deps ## How fast sessions come back after a kill, a restart, a drain, an upgrade (bench/results/failover.json)
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go run ./bench/failover $(ARGS)

.PHONY: bench-scale
bench-scale: test-deps ## The manager with 10,000 sessions applied at once (bench/results/scale.json)
	@$(assets) && export KUBEBUILDER_ASSETS && set -x && go run ./bench/scale $(ARGS)

##@ Generate

.PHONY: generate
generate: ## Write the deep copies of api/
	$(CONTROLLER_GEN) object paths=./api/...

.PHONY: docs
docs: ## Write docs/reference.md: every command, flag and metric
	go run ./hack/docs

.PHONY: manifests
manifests: ## Write the CustomResourceDefinition and the roles into config/, and what is made from them and from the chart
	$(CONTROLLER_GEN) crd paths=./api/... output:crd:dir=config/crd/bases
	$(CONTROLLER_GEN) rbac:roleName=whatsapp-operator-manager,fileName=manager_role.yaml paths=./controllers/... output:rbac:dir=config/rbac
	$(CONTROLLER_GEN) rbac:roleName=whatsapp-operator-worker,fileName=worker_role.yaml paths=./internal/worker/... output:rbac:dir=config/rbac
	go run . redis-acl | sed -n 's/^ACL SETUSER/user/p' > charts/whatsapp-operator/files/valkey-users.acl
	cd hack/chart && go run . generate
