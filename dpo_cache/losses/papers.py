"""Where the losses come from: what a model card cites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpo_cache.losses.table import loss_terms


@dataclass(frozen=True)
class Paper:
    """A paper, and what it is called here for short."""

    name: str
    title: str
    authors: str
    year: int
    url: str

    def cite(self) -> str:
        """One line of Markdown."""
        return f"{self.name}: {self.authors}, [{self.title}]({self.url}), {self.year}"


def _arxiv(name: str, number: str, authors: str, title: str) -> Paper:
    return Paper(name, title, authors, 2000 + int(number[:2]), f"https://arxiv.org/abs/{number}")


DPO = _arxiv(
    "DPO",
    "2305.18290",
    "Rafailov et al.",
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
)
CDPO = Paper(
    "cDPO",
    "A note on DPO with noisy preferences & relationship to IPO",
    "Mitchell",
    2023,
    "https://ericmitchell.ai/cdpo.pdf",
)
IPO = _arxiv(
    "IPO",
    "2310.12036",
    "Azar et al.",
    "A General Theoretical Paradigm to Understand Learning from Human Preferences",
)
APO = _arxiv(
    "APO",
    "2408.06266",
    "D'Oosterlinck et al.",
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
)
AOT = _arxiv(
    "AOT", "2406.05882", "Melnyk et al.", "Distributional Preference Alignment of LLMs via Optimal Transport"
)
LOSS_PAPERS: dict[str, Paper | None] = {
    "sigmoid": DPO,
    "sigmoid_norm": _arxiv(
        "Length-normalized DPO",
        "2411.15124",
        "Lambert et al.",
        "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
    ),
    "hinge": _arxiv(
        "RSO", "2309.06657", "Liu et al.", "Statistical Rejection Sampling Improves Preference Optimization"
    ),
    "ipo": IPO,
    "ipo_norm": IPO,
    "exo_pair": _arxiv(
        "EXO", "2402.00856", "Ji et al.", "Towards Efficient Exact Optimization of Language Model Alignment"
    ),
    "robust": _arxiv(
        "Robust DPO",
        "2403.00409",
        "Ray Chowdhury et al.",
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    ),
    "discopop": _arxiv(
        "DiscoPOP",
        "2406.08414",
        "Lu et al.",
        "Discovering Preference Optimization Algorithms with and for Large Language Models",
    ),
    "nca_pair": _arxiv(
        "NCA",
        "2402.05369",
        "Chen et al.",
        "Noise Contrastive Alignment of Language Models with Explicit Rewards",
    ),
    "bco_pair": _arxiv(
        "BCO",
        "2404.04656",
        "Jung et al.",
        "Binary Classifier Optimization for Large Language Model Alignment",
    ),
    "sppo_hard": _arxiv(
        "SPPO", "2405.00675", "Wu et al.", "Self-Play Preference Optimization for Language Model Alignment"
    ),
    "apo_zero": APO,
    "apo_down": APO,
    "aot": AOT,
    "aot_unpaired": AOT,
    "sft": None,
    "sft_norm": _arxiv("RPO", "2404.19733", "Pang et al.", "Iterative Reasoning Preference Optimization"),
    "simpo": _arxiv(
        "SimPO",
        "2405.14734",
        "Meng et al.",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    ),
    "orpo": _arxiv(
        "ORPO",
        "2403.07691",
        "Hong et al.",
        "ORPO: Monolithic Preference Optimization without Reference Model",
    ),
    "cpo": _arxiv(
        "CPO",
        "2401.08417",
        "Xu et al.",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine "
        "Translation",
    ),
    "slic": _arxiv(
        "SLiC-HF", "2305.10425", "Zhao et al.", "SLiC-HF: Sequence Likelihood Calibration with Human Feedback"
    ),
}
F_DIVERGENCES = _arxiv(
    "f-DPO",
    "2309.16240",
    "Wang et al.",
    "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
)
LD_DPO = _arxiv(
    "LD-DPO", "2409.06411", "Liu et al.", "Length Desensitization in Direct Preference Optimization"
)
WPO = _arxiv("WPO", "2406.11827", "Zhou et al.", "WPO: Enhancing RLHF with Weighted Preference Optimization")


def papers_of(config: dict[str, Any]) -> list[Paper]:
    """The papers behind the losses of a run and their settings, each once."""
    losses = list(loss_terms(config["loss"]))
    found = [LOSS_PAPERS[name] for name in losses]
    found += [CDPO] if config["label_smoothing"] and "sigmoid" in losses else []
    found += [F_DIVERGENCES] if config["f_divergence"] != "reverse_kl" else []
    found += [LD_DPO] if config["ld_alpha"] is not None else []
    found += [WPO] if config["wpo"] != "off" else []
    return list(dict.fromkeys(paper for paper in found if paper is not None))
