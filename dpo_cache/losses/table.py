"""The losses that the option `loss` accepts, and their settings, each defined once.

To add a loss, add an entry to `LOSSES` and a function of its name to `reference_losses.py` or
`policy_losses.py`. The command line, its checks, `train`, `eval`, `sweep`, model cards and the table in
docs/losses.md read the entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cache.losses.entry import Limit, Loss, Paper, arxiv, setting

TRL, ORIGINAL, LLAMA_FACTORY = "TRL 1.16", "the original DPO repository", "LLaMA-Factory"
ABOVE_ZERO = Limit(lambda value: value > 0, "{flag} {value}: expected a number above 0.")
NOT_NEGATIVE = Limit(lambda value: value >= 0, "{flag} {value}: expected 0 or more.")

DPO = arxiv(
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
IPO = arxiv(
    "IPO",
    "2310.12036",
    "Azar et al.",
    "A General Theoretical Paradigm to Understand Learning from Human Preferences",
)
APO = arxiv(
    "APO",
    "2408.06266",
    "D'Oosterlinck et al.",
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
)
AOT = arxiv(
    "AOT", "2406.05882", "Melnyk et al.", "Distributional Preference Alignment of LLMs via Optimal Transport"
)
F_DPO = arxiv(
    "f-DPO",
    "2309.16240",
    "Wang et al.",
    "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
)
LD_DPO = arxiv(
    "LD-DPO", "2409.06411", "Liu et al.", "Length Desensitization in Direct Preference Optimization"
)
WPO = arxiv("WPO", "2406.11827", "Zhou et al.", "WPO: Enhancing RLHF with Weighted Preference Optimization")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of losses: options of `train` and `eval`, fields of `Objective`."""

    beta: float = setting(
        0.1,
        "Strength of the pull to the reference; tau for IPO, the scale of the margin for SimPO, lambda "
        "for ORPO.",
        limit=ABOVE_ZERO,
    )
    label_smoothing: float = setting(
        0.0,
        "Assumed share of flipped labels, 0 to 0.5: cDPO, or as the loss defines it.",
        limit=Limit(lambda value: 0 <= value <= 0.5, "{flag} {value}: expected 0 to 0.5."),
    )
    f_divergence: str = setting(
        "reverse_kl",
        "The divergence from the reference that is penalized; reverse_kl is DPO.",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
        serves=lambda loss: loss.compares_scores,
        paper=F_DPO,
    )
    f_alpha: float = setting(
        0.5, "alpha of --f-divergence alpha_divergence.", serves=lambda loss: loss.compares_scores
    )
    ld_alpha: float | None = setting(
        None,
        "LD-DPO: weight, 0 to 1, of the tokens past the length of a pair's shorter answer.",
        serves=lambda loss: loss.has_reference,
        limit=Limit(lambda value: 0 <= value <= 1, "{flag} {value}: expected 0 to 1."),
        paper=LD_DPO,
    )
    ld_reference: bool = setting(
        True,
        "Weight the reference's tokens under --ld-alpha, too.",
        flag="--ld-reference/--no-ld-reference",
        serves=lambda loss: loss.has_reference,
    )
    wpo: str = setting(
        "off",
        "WPO: weight pairs by how likely the policy is to write them; clipped: by 1 at most.",
        choices=("off", "on", "clipped"),
        serves=lambda loss: loss.has_reference and not loss.whole_step,
        paper=WPO,
    )
    discopop_tau: float = setting(0.05, "tau of DiscoPOP.", limit=ABOVE_ZERO)
    simpo_gamma: float = setting(0.5, "Target margin of SimPO, after beta.")
    cpo_alpha: float = setting(
        1.0, "Weight of the likelihood of the chosen answer in CPO.", limit=NOT_NEGATIVE
    )
    reference_free: bool = setting(
        False,
        "Take a uniform reference in the loss.",
        flag="--reference-free/--no-reference-free",
        serves=lambda loss: loss.compares_scores,
    )


_ENTRIES = (
    Loss(
        name="sigmoid",
        inputs=("margins",),
        settings=("beta", "label_smoothing"),
        formula="`-(1-e) log s(b m) - e log s(-b m)`",
        paper=DPO,
        equation="Eq. 7",
        papers={"label_smoothing": (CDPO, "Eq. 3")},
        elsewhere={TRL: "`sigmoid` (always e = 0)", ORIGINAL: "`dpo`", LLAMA_FACTORY: "`sigmoid`"},
        tag="dpo",
        is_logistic=True,
    ),
    Loss(
        name="sigmoid_norm",
        inputs=("mean_margins",),
        formula="`-log s(b (lc/|c| - lr/|r|))`",
        paper=arxiv(
            "Length-normalized DPO",
            "2411.15124",
            "Lambert et al.",
            "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
        ),
        equation="Eq. 6",
        elsewhere={TRL: "`sigmoid_norm`"},
        tag="dpo",
        is_logistic=True,
    ),
    Loss(
        name="hinge",
        inputs=("margins",),
        formula="`max(0, 1 - b m)`",
        paper=arxiv(
            "RSO",
            "2309.06657",
            "Liu et al.",
            "Statistical Rejection Sampling Improves Preference Optimization",
        ),
        elsewhere={TRL: "`hinge`"},
    ),
    Loss(
        name="ipo",
        inputs=("margins",),
        formula="`(m - 1/(2b))^2`",
        paper=IPO,
        equation="Eq. 17",
        elsewhere={ORIGINAL: "`ipo`"},
    ),
    Loss(
        name="ipo_norm",
        inputs=("mean_margins",),
        formula="`(lc/|c| - lr/|r| - 1/(2b))^2`",
        paper=IPO,
        equation="Eq. 17",
        elsewhere={TRL: "`ipo`", LLAMA_FACTORY: "`ipo`"},
        tag="ipo",
    ),
    Loss(
        name="exo_pair",
        inputs=("margins",),
        settings=("beta", "label_smoothing"),
        formula="`s(b m) log(s(b m)/(1-e)) + s(-b m) log(s(-b m)/e)`",
        paper=arxiv(
            "EXO",
            "2402.00856",
            "Ji et al.",
            "Towards Efficient Exact Optimization of Language Model Alignment",
        ),
        equation="Eq. 16",
        elsewhere={TRL: "`exo_pair`"},
        tag="exo",
        limits={
            "label_smoothing": Limit(
                lambda value: value > 0,
                "`loss` exo_pair needs a `label_smoothing` above 0; its paper takes 0.001.",
            )
        },
    ),
    Loss(
        name="robust",
        inputs=("margins",),
        settings=("beta", "label_smoothing"),
        formula="`(-(1-e) log s(b m) + e log s(-b m)) / (1 - 2e)`",
        paper=arxiv(
            "Robust DPO",
            "2403.00409",
            "Ray Chowdhury et al.",
            "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        ),
        elsewhere={TRL: "`robust`"},
        limits={
            "label_smoothing": Limit(
                lambda value: value < 0.5, "{flag} {value}: `loss` robust expects less than 0.5."
            )
        },
    ),
    Loss(
        name="discopop",
        inputs=("margins",),
        settings=("beta", "discopop_tau"),
        formula="`-log s(z) (1 - s(z/t)) + exp(-z) s(z/t)`, `z = b m`, `t` is `discopop_tau`",
        paper=arxiv(
            "DiscoPOP",
            "2406.08414",
            "Lu et al.",
            "Discovering Preference Optimization Algorithms with and for Large Language Models",
        ),
        equation="Eq. 5",
        elsewhere={TRL: "`discopop`"},
    ),
    Loss(
        name="nca_pair",
        inputs=("chosen_logratios", "rejected_logratios"),
        formula="`-log s(b lc) - log s(-b lc)/2 - log s(-b lr)/2`",
        paper=arxiv(
            "NCA",
            "2402.05369",
            "Chen et al.",
            "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        ),
        equation="Sec. 4",
        elsewhere={TRL: "`nca_pair`"},
        tag="nca",
    ),
    Loss(
        name="bco_pair",
        inputs=("chosen_logratios", "rejected_logratios"),
        formula="`-log s(b lc) - log s(-b lr)`",
        paper=arxiv(
            "BCO",
            "2404.04656",
            "Jung et al.",
            "Binary Classifier Optimization for Large Language Model Alignment",
        ),
        elsewhere={TRL: "`bco_pair`"},
        tag="bco",
    ),
    Loss(
        name="sppo_hard",
        inputs=("chosen_logratios", "rejected_logratios"),
        formula="`(lc - 1/(2b))^2 + (lr + 1/(2b))^2`",
        paper=arxiv(
            "SPPO",
            "2405.00675",
            "Wu et al.",
            "Self-Play Preference Optimization for Language Model Alignment",
        ),
        equation="Eq. 4.7",
        elsewhere={TRL: "`sppo_hard`"},
    ),
    Loss(
        name="apo_zero",
        inputs=("chosen_logratios", "rejected_logratios"),
        formula="`1 - s(b lc) + s(b lr)`",
        paper=APO,
        equation="Eq. 7",
        elsewhere={TRL: "`apo_zero`"},
    ),
    Loss(
        name="apo_down",
        inputs=("chosen_logratios", "rejected_logratios"),
        formula="`s(b lc) + 1 - s(b m)`",
        paper=APO,
        equation="Eq. 8",
        elsewhere={TRL: "`apo_down`"},
    ),
    Loss(
        name="aot",
        inputs=("policy_margins", "reference_margins"),
        settings=("beta", "label_smoothing"),
        formula="`sigmoid` of sorted `pc - pr` minus sorted reference `c - r`",
        paper=AOT,
        equation="Sec. 3",
        elsewhere={TRL: "`aot`"},
        whole_step=True,
        is_logistic=True,
    ),
    Loss(
        name="aot_unpaired",
        inputs=("chosen_logratios", "rejected_logratios"),
        settings=("beta", "label_smoothing"),
        formula="`sigmoid` of sorted `lc` minus sorted `lr`",
        paper=AOT,
        equation="Sec. 3",
        elsewhere={TRL: "`aot_unpaired`"},
        whole_step=True,
        is_logistic=True,
    ),
    Loss(
        name="sft",
        inputs=("chosen_sums", "mean_chosen_tokens"),
        settings=(),
        formula="`-pc`, summed over the step, divided by its chosen tokens",
        paper=None,
        elsewhere={TRL: "`sft`"},
    ),
    Loss(
        name="sft_norm",
        inputs=("chosen_sums", "chosen_lengths"),
        settings=(),
        formula="`-pc/|c|`",
        paper=arxiv("RPO", "2404.19733", "Pang et al.", "Iterative Reasoning Preference Optimization"),
        equation="Eq. 1",
        elsewhere={LLAMA_FACTORY: "`pref_ftx`"},
        tag="sft",
    ),
    Loss(
        name="simpo",
        inputs=("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths"),
        settings=("beta", "simpo_gamma", "label_smoothing"),
        formula="`-log s(b (pc/|c| - pr/|r|) - g)`, `g` is `simpo_gamma`; smoothed as `sigmoid`",
        paper=arxiv(
            "SimPO",
            "2405.14734",
            "Meng et al.",
            "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        ),
        equation="Eq. 6",
        elsewhere={TRL: "CPO's `simpo`, `cpo_alpha=0`"},
    ),
    Loss(
        name="orpo",
        inputs=("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths"),
        formula="`-pc/|c| - b log s(log odds(pc/|c|) - log odds(pr/|r|))`",
        paper=arxiv(
            "ORPO",
            "2403.07691",
            "Hong et al.",
            "ORPO: Monolithic Preference Optimization without Reference Model",
        ),
        equation="Eq. 6",
        elsewhere={TRL: "ORPO, but see below", LLAMA_FACTORY: "`orpo`"},
    ),
    Loss(
        name="cpo",
        inputs=("chosen_logps", "rejected_logps", "chosen_sums", "mean_chosen_tokens"),
        settings=("beta", "label_smoothing", "cpo_alpha"),
        formula="`-log s(b (pc - pr))`, smoothed as `sigmoid`, plus `cpo_alpha` times `sft`",
        paper=arxiv(
            "CPO",
            "2401.08417",
            "Xu et al.",
            "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine "
            "Translation",
        ),
        equation="Eq. 3",
        elsewhere={TRL: "CPO's `sigmoid`"},
    ),
    Loss(
        name="slic",
        inputs=("chosen_logps", "rejected_logps"),
        formula="`max(0, 1 - b (pc - pr))`",
        paper=arxiv(
            "SLiC-HF",
            "2305.10425",
            "Zhao et al.",
            "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        ),
        elsewhere={TRL: "CPO's `hinge`, `cpo_alpha=0`"},
    ),
)
LOSSES = {entry.name: entry for entry in _ENTRIES}
