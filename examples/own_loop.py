"""DPO in your own training loop: the reference's log-probs come from the cache, only the policy is loaded.

python examples/own_loop.py MODEL CACHE NAME/SPLIT
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import dpo_cache


def train(model: torch.nn.Module, pair_set: dpo_cache.PairSet, *, beta=0.1, lr=1e-6, batch_size=8, epochs=1):
    """Fine-tune the model on the pairs. Yields the loss of each step, before its update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for epoch in range(epochs):
        for batch in dpo_cache.training_batches(pair_set, batch_size, seed=0, epoch=epoch):
            batch = batch.to(model.device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            # the logits at a position predict the token after it
            token_logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
            logps = (token_logps * batch.completion_mask[:, 1:]).sum(-1)
            chosen_logps, rejected_logps = logps.chunk(2)
            losses, _chosen_rewards, _rejected_rewards = dpo_cache.preference_loss(
                chosen_logps, rejected_logps, batch.ref_chosen_logps, batch.ref_rejected_logps, beta=beta
            )
            loss = losses.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


if __name__ == "__main__":
    location, cache, name = sys.argv[1:]
    # eval mode: the reference was scored without dropout
    policy = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()
    for step, loss in enumerate(train(policy, dpo_cache.open_cache(cache).pairs(name))):
        print(f"step {step}: loss {loss:.4f}")
    policy.save_pretrained("policy")
