"""On a CUDA device: run with `pytest -m gpu`. Skipped without one."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hici
from golden_checkpoint import CASES, CHECKPOINT, EXPECTED, IDS, MODES, NEEDED
from helpers import assert_slots_matter, difference, padded, random_ids, relative, strong_model
from hici.attention import backends, get_backend
from hici.models.attach import reconfigure
from hici.models.loss import next_token_loss
from hici.models.offload import offload_checkpoints
from hici.models.tiled_mlp import tile_mlp
from hici.train.optimizers import create_optimizer_class

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

REFERENCE = get_backend("reference").attend


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float32, 5e-3)], ids=["bf16", "float32"])
@pytest.mark.parametrize(
    "shape",
    [(2, 512, 128, 12, 0), (2, 500, 128, 12, 0), (2, 512, 128, 12, -1), (1, 400, 128, 12, -1), (2, 300, 128, 0, None)],
    ids=lambda s: f"B{s[0]}-T{s[1]}-S{s[2]}-P{s[3]}",
)
@pytest.mark.parametrize("backend", sorted({b.name for b in backends().values() if b.available()} - {"reference"}))
def test_backends_equal_the_reference(backend, shape, dtype, bound):
    b, t, s, p, slotted = shape
    heads, kv_heads, dim = 8, 2, 64

    def draw(*sizes):
        return torch.randn(*sizes, device="cuda", dtype=dtype, requires_grad=True)

    tensors = [draw(b, t, heads, dim), draw(b, t, kv_heads, dim), draw(b, t, kv_heads, dim), None, None]
    if slotted is not None:
        n = -(-t // s) + slotted
        tensors[3:] = [draw(b, n, p, kv_heads, dim), draw(b, n, p, kv_heads, dim)]
    used = [x for x in tensors if x is not None]
    weight = torch.randn(b, t, heads, dim, device="cuda")
    results = []
    for attend in (REFERENCE, get_backend(backend).attend):
        out = attend(*tensors, segment_size=s, scale=dim**-0.5)
        results.append([out, *torch.autograd.grad((out.float() * weight).sum(), used)])
    assert results[1][0].dtype == dtype
    for expected, actual in zip(*results, strict=True):
        assert relative(actual, expected) < bound


@pytest.mark.parametrize("visibility", ["all", "current", "past"])
def test_a_train_step_lowers_the_loss(visibility):
    model = strong_model(visibility=visibility).cuda().train()
    ids = random_ids(4, 29).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_the_model_equals_its_cpu_self():
    model = strong_model(visibility="past")
    ids, mask = padded([random_ids(1, 29)[0], random_ids(1, 13)[0]], "left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        out = model.cuda()(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
    assert difference(out[mask.bool()], expected[mask.bool()]) < 1e-2


@pytest.mark.parametrize("masked", [False, True], ids=["unpadded", "mask"])
def test_compile(masked):
    torch._dynamo.reset()
    model = strong_model(visibility="past").cuda()
    ids, mask = random_ids(2, 29), None
    if masked:
        ids, mask = padded([ids[0], ids[1, :13]], "left")
        mask = mask.cuda()
    ids = ids.cuda()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        out = torch.compile(model, fullgraph=True)(ids, attention_mask=mask).logits
    real = slice(None) if mask is None else mask.bool()
    assert difference(out[real], expected[real]) < 1e-2


def test_slots_matter_on_the_device():
    model = strong_model(visibility="past").to("cuda")
    reconfigure(model, backend="auto")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert_slots_matter(model.cpu())


@pytest.mark.parametrize("case", CASES)
def test_a_released_checkpoint_on_the_device(case):
    variant, mode = case.split("/")
    model = hici.from_pretrained(CHECKPOINT / variant, attention="full", device_map="cuda", **NEEDED)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    if mode != "full":
        visibility, use_global, use_local = MODES[mode]
        model.set_attn_implementation("hici")
        reconfigure(model, visibility=visibility, use_global=use_global, use_local=use_local)
    with torch.no_grad():
        out = model(IDS.cuda()).logits.cpu()
    assert difference(out, EXPECTED[f"{case}/logits"]) < 1e-2


def test_a_merged_model_on_the_device(tmp_path):
    hici.merge(CHECKPOINT / "peft_fp32", tmp_path / "m", "hici", **NEEDED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True, device_map="cuda")
    with torch.no_grad():
        out = model(IDS.cuda()).logits.cpu()
    assert difference(out, EXPECTED["peft_fp32/none/logits"]) < 1e-2


@pytest.mark.parametrize("split", [[61], [1] * 61, [5, 20, 36]], ids=["whole", "one by one", "uneven"])
def test_a_hici_cache_on_the_device(split):
    model = strong_model(visibility="past", options={"max_position_embeddings": 512}).cuda()
    rows = [random_ids(1, length, seed=length)[0] for length in (61, 33, 8)]
    ids, mask = (x.cuda() for x in padded(rows, "left"))
    cache, outputs, done = hici.HiCICache(model), [], 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        for length in split:
            piece = slice(done, done + length)
            done += length
            outputs.append(model(ids[:, piece], attention_mask=mask[:, :done], past_key_values=cache).logits)
    assert difference(torch.cat(outputs, 1)[mask.bool()], expected[mask.bool()]) < 1e-2
    assert {x.device.type for layer in cache.layers for x in layer.state.tensors().values()} == {"cuda"}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_bounded_generation_on_the_device(options, tmp_path):
    model = strong_model(visibility="past", options={"max_position_embeddings": 512}).to("cuda", torch.bfloat16)
    ids, mask = (x.cuda() for x in padded([random_ids(1, 29)[0], random_ids(1, 13)[0]], "left"))
    out = model.generate(ids, attention_mask=mask, max_new_tokens=20, pad_token_id=0, return_dict_in_generate=True,
                         **options)  # fmt: skip
    assert out.sequences.shape == (2, 49)
    assert isinstance(out.past_key_values, hici.HiCICache)
    out.past_key_values.save(tmp_path / "cache")
    loaded = hici.HiCICache.load(tmp_path / "cache", model)
    assert loaded.tokens == out.past_key_values.tokens


def _training_peak(model, ids):
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = next_token_loss(model, ids)[0]
    loss.backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, {n: p.grad for n, p in model.named_parameters()}


def test_offloaded_checkpoints_on_the_device():
    """The same gradients, step after step, and the layers' inputs are not on the device."""
    layers, tokens, width = 24, 8192, 512
    options = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 8, "intermediate_size": 512,
               "max_position_embeddings": tokens}  # fmt: skip
    model = strong_model(visibility="past", segment_size=1024, options=options, check=False).cuda().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = random_ids(1, tokens).cuda()
    _training_peak(model, ids)  # the libraries' workspaces
    plain, expected = _training_peak(model, ids)
    offload_checkpoints(model)
    for _ in range(3):
        peak, gradients = _training_peak(model, ids)
        # not all of them: at the end of the backward pass, where the peak is now, the gradients of all layers stand
        assert plain - peak > layers // 2 * tokens * width * 4
        for name, gradient in expected.items():  # the device's own sums differ from run to run
            assert relative(gradients[name], gradient) < 2e-3, name


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tiled_mlps_on_the_device(checkpointed):
    options = {"intermediate_size": 4096, "max_position_embeddings": 4096, "num_hidden_layers": 3}
    model = strong_model(visibility="past", segment_size=512, options=options, check=False).cuda().train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = random_ids(1, 4096).cuda()
    whole, expected = _training_peak(model, ids)
    tile_mlp(model, 256)
    tiled, gradients = _training_peak(model, ids)
    for name, gradient in expected.items():
        assert relative(gradients[name], gradient) < 1e-2, name
    assert whole - tiled > 3 * 4096 * 4096 * 4 * (1 if checkpointed else 3)


def test_8_bit_optimizers_on_the_device():
    pytest.importorskip("bitsandbytes")
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        model = strong_model(visibility="past").cuda().train()
        ids = random_ids(4, 29).cuda()
        cls, options = create_optimizer_class(name)
        optimizer = cls(model.parameters(), lr=3e-3, **options)
        losses = []
        for _ in range(8):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1
