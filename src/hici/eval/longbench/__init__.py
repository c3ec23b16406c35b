"""LongBench (version 1, 21 datasets): its prompts, predictions of a model, and its scores.

Bai et al., LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding, ACL 2024.
"""
