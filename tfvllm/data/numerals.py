"""Numbers in words: Chinese and English."""

import random

DIGITS = "〇一二三四五六七八九"
_UNITS = ["", "十", "百", "千"]
_MYRIADS = ["", "万", "亿"]
_SMALL = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def chinese(number: int, *, counting: bool = False) -> str:
    """A whole number below a trillion, grouped by ten thousands: 10,000 is 一万.

    Two is 两 before 百, 千, 万 and 亿 where it leads, and, where something is counted (before a measure word), by
    itself; else it is 二: 12 is 十二, 20 is 二十, 2,222 is 两千两百二十二.
    """
    if not 0 <= number < 10**12:
        raise ValueError(f"expected a number from 0 to 999,999,999,999, found {number}")
    if number == 2 and counting:
        return "两"
    if number < 10:
        return "零" if number == 0 else DIGITS[number]
    words, rest, gap = "", number, False
    for power in (2, 1, 0):
        group, rest = divmod(rest, 10 ** (4 * power))
        if not group:
            gap = bool(words)
            continue
        if words and (gap or group < 1000):
            words += "零"
        gap = False
        words += ("两" if group == 2 and power else _below_ten_thousand(group)) + _MYRIADS[power]
    return words.removeprefix("一") if words.startswith("一十") else words


def _below_ten_thousand(number: int) -> str:
    words, gap = "", False
    for power in (3, 2, 1, 0):
        digit = number // 10**power % 10
        if not digit:
            gap = gap or bool(words)
            continue
        two = digit == 2 and power >= 2
        words += ("零" if gap else "") + ("两" if two else DIGITS[digit]) + _UNITS[power]
        gap = False
    return words


def chinese_digits(number: int | str) -> str:
    """Digit by digit, as years, rooms and telephones are read: 2024 is 二〇二四."""
    return "".join(DIGITS[int(digit)] for digit in str(number))


def english(number: int, rng: random.Random | None = None) -> str:
    """A whole number: in words up to twelve, else in figures; of others that are said in two words `rng` may say so.

    >>> english(12), english(10000)
    ('twelve', '10,000')
    """
    if number <= 12:
        return _SMALL[number]
    if rng is not None and rng.random() < 0.4:
        if number < 100:
            return _in_words(number)
        for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
            if number % size == 0 and number // size < 100:
                return f"{_in_words(number // size)} {name}"
    return f"{number:,}"


def _in_words(number: int) -> str:
    if number < 20:
        return _SMALL[number]
    return _TENS[number // 10] + (f"-{_SMALL[number % 10]}" if number % 10 else "")


def ordinal(number: int) -> str:
    """First to twelfth in words, else in figures (21st)."""
    words = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
    if number <= len(words):
        return words[number - 1]
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
