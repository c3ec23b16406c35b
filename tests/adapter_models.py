"""Tiny bases on disk and adapters that a few real steps have trained. Nothing here is a test."""

import torch
from transformers import AutoModelForCausalLM

import hici
from helpers import assert_slots_matter, random_ids, randomise, small_config, tiny_model
from hici.adapters.lora import trainable_parameters
from hici.models.lookup import attention_modules

IDS = random_ids(2, 45)


def make_base(directory, architecture="llama", tie=False, seed=0):
    model = tiny_model(architecture, seed=seed, tie_word_embeddings=tie, max_position_embeddings=32)
    model.save_pretrained(directory)
    return directory


def make_trained(base, tie=False, context=64, **lora):
    """Attach, LoRA, and one real optimizer step on everything trainable, from strong weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    hici.extend_rope(model, context)
    hici.attach(model, small_config(visibility="past"))
    for attention in attention_modules(model):
        for module in (attention.local_constructor, attention.global_integrator):
            randomise(module, seed=3)
    assert_slots_matter(model)
    wrapped = hici.add_lora(model, **lora)
    optimizer = torch.optim.SGD([p for group in trainable_parameters(wrapped) for p in group], lr=0.05)
    for _ in range(2):
        wrapped(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped.eval()
