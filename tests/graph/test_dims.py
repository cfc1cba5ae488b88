from hypothesis import given
from hypothesis import strategies as st

from tfvllm.graph import dims

B, S = dims.symbol("batch"), dims.symbol("seq")


def test_equal_sizes_compare_equal_however_they_were_reached():
    assert dims.multiply(B, dims.multiply(S, 64)) == dims.multiply(dims.multiply(64, S), B)
    assert dims.add(dims.multiply(2, B), dims.subtract(S, B)) == dims.add(B, S)
    assert dims.subtract(B, B) == 0
    assert dims.product([B, 12, 64]) != dims.product([S, 12, 64])


def test_division_is_exact_or_a_symbol_of_its_own():
    assert dims.divide(dims.product([B, S, 64]), dims.multiply(S, 64)) == B
    assert dims.divide(dims.product([B, 64]), 128) != B
    odd = dims.divide(B, 2)
    assert odd == dims.divide(B, 2)
    assert dims.evaluate(odd, {"batch": 7}) == 3


def test_broadcast_is_a_set_of_sizes():
    assert dims.broadcast(B, 1) == B and dims.broadcast(1, B) == B and dims.broadcast(B, B) == B
    assert dims.broadcast(B, 5) == 5
    left = dims.broadcast(dims.broadcast(B, S), B)
    assert left == dims.broadcast(S, B)
    assert dims.evaluate(left, {"batch": 1, "seq": 9}) == 9


@given(
    st.lists(st.tuples(st.sampled_from("+-*"), st.integers(-3, 4)), max_size=6), st.integers(1, 5), st.integers(1, 5)
)
def test_arithmetic_agrees_with_numbers(steps, batch, seq):
    operations = {"+": dims.add, "-": dims.subtract, "*": dims.multiply}
    plain = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    size, number = B, batch
    for i, (sign, constant) in enumerate(steps):
        other, value = (S, seq) if i % 2 else (constant, constant)
        size, number = operations[sign](size, other), plain[sign](number, value)
    assert dims.evaluate(size, {"batch": batch, "seq": seq}) == number
