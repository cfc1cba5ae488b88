"""The maker of synthetic phrases, and numbers in words."""

import datetime
import hashlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tfvllm import data
from tfvllm.data import phrases
from tfvllm.data.numerals import DIGITS, chinese, chinese_digits, english, ordinal

PAIRS = data.synthetic_phrases(3000, seed=1)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "零"), (2, "二"), (10, "十"), (12, "十二"), (20, "二十"), (102, "一百零二"), (110, "一百一十"),
        (200, "两百"), (2222, "两千两百二十二"), (1010, "一千零一十"), (10_000, "一万"), (10_010, "一万零一十"),
        (12_345, "一万两千三百四十五"), (20_000, "两万"), (100_000, "十万"), (120_000, "十二万"),
        (200_000, "二十万"), (1_000_000, "一百万"), (20_020_000, "两千零二万"), (100_000_000, "一亿"),
        (100_010_000, "一亿零一万"), (200_000_001, "两亿零一"),
    ],
)  # fmt: skip
def test_chinese_numbers(number, words):
    assert chinese(number) == words
    assert chinese(number, counting=True) == ("两" if number == 2 else words)


def read(words: str) -> int:
    """The number that Chinese words say."""
    total = group = digit = 0
    for sign in words:
        if sign in "千百十":
            group += (digit or 1) * {"千": 1000, "百": 100, "十": 10}[sign]
            digit = 0
        elif sign in "万亿":
            total += (group + digit) * {"万": 10**4, "亿": 10**8}[sign]
            group = digit = 0
        elif sign != "零":
            digit = 2 if sign == "两" else DIGITS.index(sign)
    return total + group + digit


@given(st.integers(0, 10**12 - 1))
@example(1_0000_0000_0000 - 1)
def test_chinese_numbers_say_the_number(number):
    words = chinese(number)
    assert read(words) == number
    assert "零零" not in words and not (number and words.endswith("零"))


def test_other_numbers():
    with pytest.raises(ValueError, match="expected a number from 0 to 999,999,999,999, found -1"):
        chinese(-1)
    assert chinese_digits(2024) == "二〇二四"
    assert [english(number) for number in (0, 12, 13, 10_000)] == ["zero", "twelve", "13", "10,000"]
    assert [ordinal(number) for number in (1, 10, 11, 12, 13, 21, 22, 23, 30)] == [
        *("first", "tenth", "11th", "12th", "13th", "21st", "22nd", "23rd", "30th")
    ]


def test_they_are_the_same_on_every_machine():
    assert data.synthetic_phrases(3000, seed=1) == PAIRS
    assert data.synthetic_phrases(5, seed=1) == PAIRS[:5] != data.synthetic_phrases(5, seed=2)
    assert hashlib.sha256(repr(PAIRS).encode()).hexdigest()[:16] == "81e68845efddfa6a"


def test_they_are_short_different_and_written_as_people_write():
    assert len({english for english, _ in PAIRS}) == len({chinese for _, chinese in PAIRS}) == 3000
    for words, told in PAIRS:
        assert 3 <= len(words.split()) <= 20
        assert words[0].isupper() or words[0].isdigit()
        assert (words[-1], told[-1]) in ((".", "。"), ("?", "？"))
        assert re.fullmatch(r"[\u4e00-\u9fff〇，。；、？]+", told), told
        assert "  " not in words and "{" not in words
        assert not re.search(r"(?<!')\b(a [aeiou]|an (?!hour)[^aeiou])", words), words


def test_the_year_comes_first_and_the_weekday_is_right():
    seen = 0
    form = re.compile(r"on (\w+day), (?:(\w+) (\d+), (\d+)|(\d+) (\w+) (\d+))\.")
    for words, told in PAIRS:
        if found := form.search(words):
            weekday, *first, second_day, second_month, second_year = found.groups()
            month, day, year = first if first[0] else (second_month, second_day, second_year)
            date = datetime.date(int(year), phrases._MONTHS.index(month) + 1, int(day))
            assert date.strftime("%A") == weekday
            said = re.search(r"([〇一二三四五六七八九]{4})年(\w+)月(\w+)日星期(\w)", told)
            assert "".join(str(DIGITS.index(digit)) for digit in said[1]) == year
            assert (read(said[2]), read(said[3])) == (date.month, date.day)
            assert "一二三四五六日".index(said[4]) == date.weekday()
            seen += 1
    assert seen > 50


def test_measure_words_and_two():
    things = [*phrases._FOOD, *phrases._GOODS]
    seen = 0
    for words, told in PAIRS:
        for thing in things:
            if re.search(rf"(?<!-)\btwo {thing.many}\b(?! of)", words):
                assert f"两{thing.measure}{thing.noun}" in told
                seen += 1
            elif re.search(rf"\b(12|twelve) {thing.many}\b(?! of)", words):
                assert f"十二{thing.measure}{thing.noun}" in told
    assert seen > 100
    counted = "|".join({thing.measure for thing in things})
    assert not [told for _, told in PAIRS if re.search(rf"(?<![第十]|[〇一二三四五六七八九])二({counted})", told)]


def test_what_things_cost_multiplies():
    seen = 0
    for words, told in PAIRS:
        if words.startswith("Each "):
            each, many, total = re.search(
                r"每\w(?:[^一二两三四五六七八九十百千万]+)(\w+)元，(\w+?)[^\W一二两三四五六七八九十百千万零]+就是(\w+)元",
                told,
            ).groups()
            assert read(each) * read(many) == read(total), told
            seen += 1
    assert seen > 20


CHECKED = {
    "The plane to New York leaves at 5:12 in the afternoon.": "去纽约的飞机下午五点十二分出发。",
    "My sister was born in Berlin on 14 April 1989.": "我姐姐是一九八九年四月十四日在柏林出生的。",
    "How do I get from the supermarket to the market?": "从超市到市场怎么走？",
    "This pair of glasses costs 15,002 yuan.": "这副眼镜一万五千零二元。",
    "John waited at the swimming pool for two and a half hours.": "约翰在游泳池等了两个半小时。",
    "We moved the match from 25 May to October 19.": "我们把比赛从五月二十五日改到了十月十九日。",
    "Is the bank still open at 6:24 in the morning?": "银行早上六点二十四分还开门吗？",
    "The school has 2,765 visitors a year.": "学校每年有两千七百六十五名访客。",
    "Is the interview on 9 September or on August 1?": "面试是九月九日还是八月一日？",
    "The cinema was built on 15 September 2023.": "电影院是二〇二三年九月十五日建成的。",
    "The bus from Guangzhou is three minutes late.": "从广州来的公共汽车晚点了三分钟。",
    "My friend is in room 1127.": "我的朋友在一一二七号房间。",
    "Walk 430 meters from the hospital, then turn left at the museum.": "从医院走四百三十米，然后在博物馆左转。",
    "Please bring two glasses of milk to table 23.": "请把两杯牛奶送到二十三号桌。",
    "My friend paid 7.90 yuan for two coats.": "我的朋友花七元九角买了两件大衣。",
    "Turn right at the fourth crossing; the restaurant is on the right.": "在第四个路口右转，饭馆在右边。",
    "62 yuan is too expensive; how about 43 yuan?": "六十二元太贵了，四十三元怎么样？",
    "David bought two white dictionaries and two purple trees.": "大卫买了两本白色的词典和两棵紫色的树。",
    "The phone number of the swimming pool is 54041270.": "游泳池的电话号码是五四〇四一二七〇。",
    "Turn right at the first bridge and walk 130 meters.": "在第一座桥右转，再走一百三十米。",
    "There are four yellow beds in the restaurant.": "饭馆里有四张黄色的床。",
    "My sister went to Shanghai on Tuesday, 22 December 2015.": "我姐姐二〇一五年十二月二十二日星期二去了上海。",
    "About 620 people live near the market.": "大约有六百二十个人住在市场附近。",
    "My friend was born on 13 October 1955.": "我的朋友是一九五五年十月十三日出生的。",
    "My friend went to Shanghai on Friday, February 6, 1959.": "我的朋友一九五九年二月六日星期五去了上海。",
    "My friend would like four eggs, two fish and a piece of cake.": "我的朋友想要四个鸡蛋、两条鱼和一块蛋糕。",
    "My friend was born in Berlin on July 15, 2012.": "我的朋友是二〇一二年七月十五日在柏林出生的。",
}


def test_some_phrases_of_each_form():
    """Read one by one and found right."""
    pairs = dict(PAIRS)
    assert {words: pairs[words] for words in CHECKED} == CHECKED
