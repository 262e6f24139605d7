# make repro: rebuild the comparison. make test: check the code. Both make .venv first.
export PYTHONDONTWRITEBYTECODE =
bin = .venv/bin

.PHONY: repro test images gsm8k-local clean

repro: .venv
	@started=$$(date +%s); $(bin)/mathmind repro && echo "the graph took $$(($$(date +%s) - started)) s"
	$(bin)/mathmind report

test: .venv
	$(bin)/python -m pytest -n 2 --dist loadgroup

# The containers that params.yaml's roles name; see docs/images.md.
images: .venv
	docker/build

# The real benchmark's text through the same graph, in a branch or clone of its own: make gsm8k-local FROM=folder
gsm8k-local:
	@test -n "$(FROM)" || { echo "make gsm8k-local FROM=FOLDER: name the folder that holds train.jsonl and test.jsonl"; exit 2; }
	mkdir -p data/local/gsm8k
	cp "$(FROM)/train.jsonl" "$(FROM)/test.jsonl" data/local/gsm8k/
	cp params/gsm8k-local.yaml params.yaml
	@echo "params.yaml is now the gsm8k-local profile: run make repro"

.venv: docker/cpu.lock docker/host.lock docker/uv.lock docker/tools.lock docker/uv.toml pyproject.toml
	docker/install ../.venv cpu host
	$(bin)/uv pip install --quiet --python $(bin)/python --no-deps --no-build-isolation --editable .
	@$(bin)/mathmind plots-page
	@touch .venv

clean:
	rm -rf .venv
