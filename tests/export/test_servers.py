"""Integer formats of servers: what the packed tensors decode to, and what the constraint costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.export.converted import convert, write
from torch import Tensor

from fissile.errors import UnsupportedModel
from fissile.export.engines import ENGINES, engine_rules
from fissile.export.server_folder import prepare_server, write_server
from fissile.export.servers import compressed_tensors, gptq_tensors, quantization_config
from fissile.export.verify import verify
from fissile.io.headers import open_checkpoint_headers
from fissile.quant.baselines import rtn
from fissile.quant.integer_zeros import solve_integer_zeros


def problem(rows: int = 24, inputs: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with shifted groups, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    weight += torch.randn(rows, inputs // 32, generator=generator).repeat_interleave(32, 1) * 0.5
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(512, inputs, generator=generator) @ mix
    return weight, x.T @ x / 512


def unpack(words: Tensor, bits: int) -> np.ndarray:
    """Values of every int32 along the last axis, lowest bits first, one by one."""
    rows = []
    for row in words.numpy().astype(np.int64) & 0xFFFFFFFF:
        rows.append([(w >> s) & ((1 << bits) - 1) for w in row for s in range(0, 32, bits)])
    return np.array(rows)


def test_compressed_tensors_decode_by_hand() -> None:
    weight, hessian = problem()
    solved = solve_integer_zeros(weight, hessian, group_size=32)
    parts = compressed_tensors("x", solved)
    codes = unpack(parts["x.weight_packed"], 4).astype(np.float32)
    zeros = unpack(parts["x.weight_zero_point"].T.contiguous(), 4).T.astype(np.float32)
    scale = parts["x.weight_scale"].float().numpy()
    assert zeros.shape == (24, 4)
    assert len(np.unique(zeros)) > 2
    decoded = (codes - zeros.repeat(32, 1)) * scale.repeat(32, 1)
    assert (decoded == solved.dequantize().numpy()).all()
    assert parts["x.weight_shape"].tolist() == [24, 128]


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_decodes_by_hand(bits: int) -> None:
    weight, hessian = problem()
    options = {"bits": bits, "group_size": 32, "symmetric": True}
    solved = solve_integer_zeros(weight, hessian, scale_dtype=torch.float16, **options)  # type: ignore[arg-type]
    parts = gptq_tensors("x", solved)
    codes = unpack(parts["x.qweight"].T.contiguous(), bits)
    zeros = unpack(parts["x.qzeros"], bits)
    assert (zeros == (1 << (bits - 1)) - 1).all()
    group = parts["x.g_idx"].numpy()
    assert (group == np.arange(128) // 32).all()
    scale = parts["x.scales"].float().numpy()[group].T
    decoded = (codes - (1 << (bits - 1))).astype(np.float32) * scale
    assert (decoded == solved.dequantize().numpy()).all()


def loss_of(delta: Tensor, hessian: Tensor) -> float:
    return float(((delta.double() @ hessian.double()) * delta.double()).sum())


def test_solver_beats_rounding_and_reports_its_loss() -> None:
    weight, hessian = problem()
    asymmetric = solve_integer_zeros(weight, hessian, group_size=32)
    symmetric = solve_integer_zeros(weight, hessian, group_size=32, symmetric=True)
    measured = loss_of(asymmetric.dequantize() - weight, hessian)
    assert float(asymmetric.loss.double().sum()) == pytest.approx(measured, rel=1e-4)
    free = loss_of(rtn(weight, 4, 32).dequantize(4) - weight, hessian)
    assert measured < 0.6 * free
    assert measured < loss_of(symmetric.dequantize() - weight, hessian)
    eight = solve_integer_zeros(weight, hessian, group_size=32, bits=8)
    assert loss_of(eight.dequantize() - weight, hessian) < measured / 50


def test_rounds_never_hurt_a_row() -> None:
    weight, hessian = problem(seed=3)
    losses = [
        solve_integer_zeros(weight, hessian, group_size=32, rounds=n).loss.double()
        for n in (0, 1, 4)
    ]
    assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all())
    assert bool((losses[2] <= losses[1] * (1 + 1e-5)).all())
    assert float(losses[2].sum()) < 0.99 * float(losses[0].sum())


def damped(hessian: Tensor) -> Tensor:
    """The solver's objective: a ridge of a hundredth of the mean diagonal."""
    ridge = 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    return (hessian + ridge).double()


def test_scales_are_the_least_squares_solution_for_their_codes() -> None:
    """With one code and zero each, the scales of a row are a linear problem in float64."""
    weight, hessian = problem(seed=5)
    solved = solve_integer_zeros(
        weight, hessian, group_size=32, rounds=6, scale_dtype=torch.float32
    )
    root = torch.linalg.cholesky(damped(hessian))
    steps = solved.codes.double() - solved.zero.double().repeat_interleave(32, 1)
    exact = []
    for row, target in zip(steps, weight.double(), strict=True):
        columns = torch.block_diag(*row.unflatten(0, (-1, 32))[:, :, None])
        exact.append(torch.linalg.lstsq(root.T @ columns, root.T @ target[:, None])[0][:, 0])
    found, wanted = solved.scale.double(), torch.stack(exact)
    # A row whose last step changed codes keeps the scales it was found with.
    near = ((found - wanted).abs() <= 1e-3 * wanted.abs()).all(1)
    assert float(near.double().mean()) > 0.5


def improvable(rounds: int) -> float:
    """Share of codes that a step of one, all else fixed, would make better."""
    weight, hessian = problem(seed=5)
    solved = solve_integer_zeros(
        weight, hessian, group_size=32, rounds=rounds, scale_dtype=torch.float32
    )
    metric = damped(hessian)
    scale = solved.scale.double().repeat_interleave(32, 1)
    codes = solved.codes.double()
    pull = (solved.dequantize().double() - weight.double()) @ metric
    better = torch.zeros_like(codes, dtype=torch.bool)
    for step in (-1.0, 1.0):
        change = 2 * step * scale * pull + scale.square() * metric.diagonal()
        inside = (codes + step >= 0) & (codes + step <= 15)
        better |= (change < 0) & inside
    return float(better.double().mean())


def test_codes_descend_until_no_single_step_helps() -> None:
    start, end = improvable(0), improvable(8)
    assert start > 0.02
    assert end < start / 4


def test_rows_of_zeros_and_constants_survive() -> None:
    weight, hessian = problem()
    weight[0], weight[1] = 0.0, 0.25
    solved = solve_integer_zeros(weight, hessian, group_size=32)
    assert not solved.dequantize()[0].any()
    assert float((solved.dequantize()[1] - 0.25).abs().max()) < 0.01


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq"])
def test_folder_is_what_servers_read(
    method: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    planned = prepare_server(tiny_model, method, bits=None, group_size=32)
    result = write_server(planned, tmp_path / "out", data=text_file, tokens=1024)
    assert 0 < result["relative_loss_mean"] < 0.05
    report = verify(tmp_path / "out", target="vllm")
    assert report.ok, report
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    assert config["architectures"] == ["LlamaForCausalLM"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    packed = "weight_packed" if method == "compressed-tensors" else "qweight"
    assert sum(name.endswith(packed) for name in tensors) == 2 * 7
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "bits", "group", "reason"),
    [
        ("compressed-tensors", 2, 32, "2 bits have no kernel"),
        ("gptq", 3, 32, "3 bits have no kernel"),
        ("gptq", 8, 48, "group size 48 does not divide"),
    ],
)
def test_refusals(method: str, bits: int, group: int, reason: str, tiny_model: Path) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        prepare_server(tiny_model, method, bits=bits, group_size=group)


def test_routed_and_quantized_models_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    artifact = write(convert(tiny_model, "pregate", 1), tmp_path / "artifact", group=32)
    with pytest.raises(UnsupportedModel) as caught:
        prepare_server(artifact, "gptq", bits=None, group_size=32)
    assert "start from the float model" in str(caught.value)
    assert "--to dense" in str(caught.value)


def test_mixed_widths_in_fused_linears_are_found(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    planned = prepare_server(tiny_model, "gptq", bits=8, group_size=32)
    write_server(planned, tmp_path / "out", data=text_file, tokens=512)
    headers = open_checkpoint_headers(tmp_path / "out")
    assert all(rule.ok for rule in engine_rules(ENGINES["vllm"], headers))
    del headers.tensors["model.layers.1.self_attn.k_proj.qweight"]
    broken = [rule for rule in engine_rules(ENGINES["vllm"], headers) if not rule.ok]
    assert "model.layers.1.self_attn.k_proj" in broken[0].detail
    headers.config["quantization_config"]["bits"] = 2
    names = [rule.name for rule in engine_rules(ENGINES["vllm"], headers) if not rule.ok]
    assert "width" in names


def test_command_line(
    run_cli: Callable[..., tuple[int, str, str]], tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ["export", tiny_model, "--to", "compressed-tensors", "--group-size", "32"]
    code, out, _ = run_cli(*words, "--json")
    assert code == 0
    assert json.loads(out)["bits_per_weight"] == 4.625
    options = ["--out", tmp_path / "x", "--data", text_file, "--tokens", "512", "--json", "-q"]
    code, out, _ = run_cli(*words, *options)
    assert code == 0
    assert json.loads(out)["relative_loss_mean"] > 0


def test_the_formats_own_package_decodes_the_same() -> None:
    module = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    weight, hessian = problem()
    solved = solve_integer_zeros(weight, hessian, group_size=32)
    parts = {k.removeprefix("x."): v for k, v in compressed_tensors("x", solved).items()}
    parts["weight_scale"] = parts["weight_scale"].float()
    config = quantization_config("compressed-tensors", 4, 32)["config_groups"]["group_0"]
    scheme = schemes.QuantizationScheme(**config)
    compressor = next(
        item
        for name, item in vars(module).items()
        if name.endswith("Compressor") and "Pack" in name
    )
    decoded = compressor.decompress(parts, scheme)["weight"]
    assert torch.equal(decoded.float(), solved.dequantize())
