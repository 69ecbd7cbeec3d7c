# Ablations: every overlay in configs/METHOD/ablations times ABLATION_SEEDS, at SCALE smoke, default or full.
# Make's own graph is the engine: a finished run (its file `done`) is not run again, -j runs side by side, a run that
# failed does not stop the others and is listed at the end. SCALE=smoke walks every path in seconds a run.

SCALE ?= default
ABLATION_SEEDS ?= $(if $(filter smoke,$(SCALE)),0,0 1 2)
ABLATION_ROOT ?= runs/ablations
ABLATION_RUNS := $(ABLATION_ROOT)/$(SCALE)
# Fewer of them: make ablations-movekd NAMES="text-only fixed"
NAMES ?= base $(basename $(notdir $(wildcard configs/$(METHOD)/ablations/*.yaml)))

.PHONY: ablations ablations-tove ablations-movekd
ablations: ablations-tove ablations-movekd ## Ablations of both methods: SCALE=smoke|default|full, -j2, NAMES="..." for fewer

ablations-tove: $(STAMP) ## Ablations of ToVE, and a report that compares them with the base
	@$(MAKE) --no-print-directory -k METHOD=tove ablation-runs || true
	@$(MAKE) --no-print-directory METHOD=tove ablation-report

ablations-movekd: $(STAMP) ## Ablations of MoVE-KD, and a report that compares them with the base
	@$(MAKE) --no-print-directory -k METHOD=movekd ablation-runs || true
	@$(MAKE) --no-print-directory METHOD=movekd ablation-report

ifdef METHOD
.PHONY: ablation-runs ablation-report
# Seed by seed: what is cut short leaves whole comparisons.
ABLATION_DONE := $(foreach seed,$(ABLATION_SEEDS),$(foreach name,$(NAMES),$(ABLATION_RUNS)/$(METHOD)/$(name)/seed$(seed)/done))
ablation-runs: $(ABLATION_DONE)

# $(1) name, $(2) seed
define ABLATION
$(ABLATION_RUNS)/$(METHOD)/$(1)/seed$(2)/done:
	@$(PY) -m benchmarks.ablations $(METHOD) $(1) --seed $(2) --scale $(SCALE) --root $(ABLATION_ROOT)
endef
$(foreach seed,$(ABLATION_SEEDS),$(foreach name,$(NAMES),$(eval $(call ABLATION,$(name),$(seed)))))

ablation-report:
	@failed=$$(find $(ABLATION_RUNS)/$(METHOD) -name failed | sort); \
	if [ -n "$$failed" ]; then echo "Runs that failed:"; for file in $$failed; do echo "  $$(dirname $$file): $$(cat $$file)"; done; fi; \
	$(BIN)/visexpert compare $(ABLATION_RUNS)/$(METHOD)/*/seed* --baseline base --out $(ABLATION_RUNS)/report-$(METHOD); \
	[ -z "$$failed" ]
endif
