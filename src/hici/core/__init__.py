"""HiCI's three stages in pure torch, in the paper's order. Never imports transformers.

Shape legend of this package: B batch, T tokens, N segments, S tokens in a segment, M local slots, K global slots,
P = K + M, D model width, C bottleneck width (D_b in the paper), h heads, d = C / h.
"""
