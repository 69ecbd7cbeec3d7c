# Ablations: every overlay in configs/METHOD/ablations, and the hybrids, times ABLATION_SEEDS, at SCALE smoke, default or
# full. Make's own graph is the engine: a finished run (its file `done`) is not run again, -j runs side by side, a run
# that failed does not stop the others and is listed at the end. SCALE=smoke walks every path in seconds a run.

SCALE ?= default
ABLATION_SEEDS ?= $(if $(filter smoke,$(SCALE)),0,0 1 2)
ABLATION_ROOT ?= runs/ablations
# Fewer of them: make ablations-movekd NAMES="text-only fixed"
NAMES ?=

ABLATION_RUNS := $(ABLATION_ROOT)/$(SCALE)
overlay_names = $(basename $(notdir $(wildcard $(1)/*.yaml)))
NAMES_tove := base $(call overlay_names,configs/tove/ablations)
NAMES_movekd := base $(call overlay_names,configs/movekd/ablations)
NAMES_hybrid := $(call overlay_names,configs/hybrid)
# Seed by seed: what is cut short leaves whole comparisons.
runs_of = $(foreach seed,$(ABLATION_SEEDS),$(foreach name,$(or $(NAMES),$(NAMES_$(1))),$(ABLATION_RUNS)/$(1)/$(name)/seed$(seed)/done))

.PHONY: ablations ablations-tove ablations-movekd ablations-hybrid
ablations: ablations-tove ablations-movekd ablations-hybrid ## Ablations of both methods and hybrids: SCALE=smoke|default|full, -j2, NAMES="..." for fewer
ablations-tove: ## Ablations of ToVE, and a report that compares them with the base
ablations-movekd: ## Ablations of MoVE-KD, and a report that compares them with the base
ablations-hybrid: ## Mixes of both methods, and a report
ablations-tove ablations-movekd ablations-hybrid: ablations-%: $(STAMP)
	@$(MAKE) --no-print-directory -k ablation-runs-$* || true
	@$(MAKE) --no-print-directory ablation-report-$*

.PHONY: ablation-runs-tove ablation-runs-movekd ablation-runs-hybrid
ablation-runs-tove: $(call runs_of,tove)
ablation-runs-movekd: $(call runs_of,movekd)
ablation-runs-hybrid: $(call runs_of,hybrid)

# $(1) method, $(2) name, $(3) seed
define ABLATION
$(ABLATION_RUNS)/$(1)/$(2)/seed$(3)/done:
	@$(PY) -m benchmarks.ablations $(1) $(2) --seed $(3) --scale $(SCALE) --root $(ABLATION_ROOT)
endef
$(foreach method,tove movekd hybrid,$(foreach name,$(NAMES_$(method)),$(foreach seed,$(ABLATION_SEEDS),$(eval $(call ABLATION,$(method),$(name),$(seed))))))

# What a hybrid starts from.
define HYBRID
$(ABLATION_RUNS)/hybrid/gate-weighted/seed$(1)/done: $(ABLATION_RUNS)/tove/base/seed$(1)/done
$(ABLATION_RUNS)/hybrid/from-merged/seed$(1)/done: $(ABLATION_RUNS)/tove/merge/seed$(1)/done
endef
$(foreach seed,$(ABLATION_SEEDS),$(eval $(call HYBRID,$(seed))))

ablation-report-%:
	@failed=$$(find $(ABLATION_RUNS)/$* -name failed | sort); \
	if [ -n "$$failed" ]; then echo "Runs that failed:"; for file in $$failed; do echo "  $$(dirname $$file): $$(cat $$file)"; done; fi; \
	$(BIN)/visexpert compare $(ABLATION_RUNS)/$*/*/seed* $$(test -d $(ABLATION_RUNS)/$*/base && echo --baseline base) --out $(ABLATION_RUNS)/report-$*; \
	[ -z "$$failed" ]
