"""The order of the kernels against the stored format and against bits picked by hand."""

from __future__ import annotations

import pytest
import torch

from fissile.kernels import layout, tiles
from fissile.kernels.fields import block_codes

BITS = (2, 3, 4, 6, 8)


def stored(
    experts: int, rows: int, inputs: int, group_size: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Parts of all widths, random codes and floats."""
    generator = torch.Generator().manual_seed(seed)

    def codes() -> torch.Tensor:
        shape = (experts, rows, inputs)
        return torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)

    parts = layout.pack(codes()) | layout.pack_residual(codes())
    for bits in layout.WIDTHS:
        floats = torch.randn(2, experts, rows, inputs // group_size, generator=generator)
        parts[f"theta_{bits}"] = layout.encode_theta(floats[0], floats[1])
    return parts


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("experts", "rows", "inputs", "group_size"),
    [(1, 256, 512, 128), (3, 40, 96, 32), (2, 150, 448, 64)],
)
def test_tiles_decode_to_the_stored_weight_bit_for_bit(
    bits: int, paired: bool, experts: int, rows: int, inputs: int, group_size: int
) -> None:
    parts = stored(experts, rows, inputs, group_size)
    weight = tiles.tile(parts, bits, paired=paired)
    assert weight.shape == (experts, rows, inputs)
    assert torch.equal(tiles.untile(weight), layout.dequantize(parts, bits))
    back = tiles.stored_parts(weight)
    assert set(back) == set(layout.segment_names(bits))
    assert all(torch.equal(part, parts[name]) for name, part in back.items())


@pytest.mark.parametrize("bits", BITS)
def test_whole_blocks_take_exactly_their_bits(bits: int) -> None:
    parts = stored(2, 256, 1024, 128)
    weight = tiles.tile(parts, bits)
    codes = weight.codes.nbytes + (0 if weight.extra is None else weight.extra.nbytes)
    assert codes * 8 == {6: 8}.get(bits, bits) * 2 * 256 * 1024
    floats = weight.theta.nbytes + (0 if weight.theta_extra is None else weight.theta_extra.nbytes)
    assert floats == (2 if bits > 4 else 1) * 2 * 256 * 1024 // 128 * 4
    assert weight.nbytes == codes + floats


def test_bits_lie_where_the_module_says() -> None:
    parts = stored(1, 300, 1024, 64, seed=3)
    row, inputs = 200, (0, 33, 170, 255, 256, 420, 511, 700, 1023)
    for bits in BITS:
        weight = tiles.tile(parts, bits)
        wide = bits if bits < 5 else 8
        code = layout.unpack(parts, min(bits, 4))[0, row]
        residual = layout.unpack_residual(parts, max(bits, 6))[0, row]
        for k in inputs:
            block, within = divmod(k, block_codes(wide))
            span = 256 if bits == 3 else block_codes(wide)
            half, e, i = within // span, within % span // 32, within % 32
            word = int(weight.codes[0, 1, block, half, row - 128, i]) & 0xFFFF
            if bits == 2:
                got = word >> (2 * e) & 3
            elif bits == 3:
                assert weight.extra is not None
                byte = int(weight.extra[0, 1, block, row - 128, i]) >> (8 * half) & 0xFF
                if e < 5:
                    got = word >> (3 * e) & 7
                else:
                    got = byte >> (3 * (e - 5)) & 7 if e < 7 else byte >> 6 | word >> 15 << 2
            else:
                got = word >> (4 * e) & 15
            assert got == int(code[k])
            if bits > 4:
                assert weight.extra is not None
                assert int(weight.extra[0, 1, block, row - 128, i]) >> (4 * e) & 15 == residual[k]


def test_pairs_alternate_by_eight_rows() -> None:
    order = tiles.row_order(2 * 72, True).tolist()
    assert order[:24] == [*range(8), *range(72, 80), *range(8, 16)]
    assert order[128:144] == [*range(64, 72), *range(136, 144)]
    assert order[144:] == [-1] * 112


def test_padding_decodes_to_zero() -> None:
    weight = tiles.tile(stored(1, 40, 96, 32), 4)
    assert weight.codes.shape == (1, 1, 1, 1, 128, 32)
    assert weight.theta.shape == (1, 1, 4, 128)
    assert not weight.theta[:, :, 3].any()
    assert not weight.theta[..., 40:].any()
    assert not weight.codes[..., 40:, :].any()


def test_what_the_kernels_do_not_take_is_refused_with_the_reason() -> None:
    parts = stored(1, 16, 96, 48)
    with pytest.raises(ValueError, match="group_size 48: the kernels take 32, 64, 128"):
        tiles.tile(parts, 4)
    parts = stored(1, 15, 64, 32)
    with pytest.raises(ValueError, match="bits 5: the kernels take 2, 3, 4, 6, 8"):
        tiles.check_tile(5, 32)
    with pytest.raises(ValueError, match="15 rows are no pairs"):
        tiles.tile(parts, 4, paired=True)
    with pytest.raises(ValueError, match=r"companding 3\.0: the kernels take 1\.0, 1\.5, 2\.0"):
        tiles.tile(parts, 4, companding=3.0)


@pytest.mark.parametrize("companding", layout.COMPANDED)
@pytest.mark.parametrize("bits", BITS)
def test_companded_weights_keep_their_values(bits: int, companding: float) -> None:
    parts = stored(2, 24, 96, 32)
    weight = tiles.tile(parts, bits, companding=companding)
    assert torch.equal(tiles.untile(weight), layout.dequantize(parts, bits, companding))


def test_a_weight_moves_as_a_whole() -> None:
    weight = tiles.tile(stored(1, 16, 64, 32), 3)
    moved = weight.to("meta")
    assert {part.device.type for part in moved.tensors().values()} == {"meta"}
    assert set(moved.tensors()) == {"codes", "extra", "theta"}
