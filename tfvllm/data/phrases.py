"""Synthetic phrases: a generator's English phrases with their Chinese translations, for models that translate."""

import datetime
import random
from typing import NamedTuple

from tfvllm.data.numerals import chinese, chinese_digits, english, ordinal

# Both sides are written from one meaning, by rules: the day after the month after the year, the time and the place
# before the verb, a measure word between number and noun, 两 where English has one word for two, ten thousands where it
# has thousands.

PHRASES_NOTE = "synthetic phrases, written by a generator (tfvllm.data.synthetic_phrases); no person wrote them"
SHORTEST, LONGEST = 3, 20  # English words


class _Thing(NamedTuple):
    """`one` and `many` are said in English, `measure` and `noun` in Chinese."""

    one: str
    many: str
    measure: str
    noun: str


def _things(rows: str) -> list[_Thing]:
    return [_Thing(*row.split("|")) for row in rows.split()]


_FOOD = [
    _Thing(f"{vessel} of {food}", f"{vessels} of {food}", measure, noun)
    for vessel, vessels, measure, foods in (
        ("cup", "cups", "杯", {"tea": "茶", "coffee": "咖啡", "hot chocolate": "热巧克力"}),
        ("glass", "glasses", "杯", {"water": "水", "milk": "牛奶", "apple juice": "苹果汁", "beer": "啤酒"}),
        ("bottle", "bottles", "瓶", {"red wine": "红酒", "cola": "可乐", "vinegar": "醋"}),
        ("bowl", "bowls", "碗", {"rice": "米饭", "noodles": "面条", "soup": "汤"}),
        ("plate", "plates", "盘", {"dumplings": "饺子", "vegetables": "蔬菜", "fruit": "水果"}),
        ("piece", "pieces", "块", {"cake": "蛋糕", "chocolate": "巧克力", "tofu": "豆腐"}),
        ("slice", "slices", "片", {"bread": "面包", "ham": "火腿"}),
    )
    for food, noun in foods.items()
]
_FOOD += _things(
    "egg|eggs|个|鸡蛋 apple|apples|个|苹果 hamburger|hamburgers|个|汉堡 fish|fish|条|鱼 banana|bananas|根|香蕉"
)
_GOODS = _things(
    "book|books|本|书 dictionary|dictionaries|本|词典 notebook|notebooks|本|笔记本 map|maps|张|地图 "
    "ticket|tickets|张|票 table|tables|张|桌子 bed|beds|张|床 chair|chairs|把|椅子 "
    "umbrella|umbrellas|把|雨伞 knife|knives|把|刀 pen|pens|支|笔 candle|candles|支|蜡烛 "
    "shirt|shirts|件|衬衫 coat|coats|件|大衣 skirt|skirts|条|裙子 scarf|scarves|条|围巾 hat|hats|顶|帽子 "
    "computer|computers|台|电脑 camera|cameras|台|照相机 car|cars|辆|汽车 bicycle|bicycles|辆|自行车 "
    "watch|watches|块|手表 box|boxes|个|盒子 bag|bags|个|包 cup|cups|个|杯子 newspaper|newspapers|份|报纸 "
    "cat|cats|只|猫 bird|birds|只|鸟 dog|dogs|条|狗 horse|horses|匹|马 flower|flowers|朵|花 "
    "tree|trees|棵|树"
)
_GOODS += [
    _Thing(f"pair of {many}", f"pairs of {many}", measure, noun)
    for many, measure, noun in (("shoes", "双", "鞋"), ("socks", "双", "袜子"), ("glasses", "副", "眼镜"))
]
_COLOURS = {
    "red": "红色的", "blue": "蓝色的", "green": "绿色的", "yellow": "黄色的", "white": "白色的", "black": "黑色的",
    "brown": "棕色的", "purple": "紫色的",
}  # fmt: skip
_NAMES = {
    "Tom": "汤姆", "Mary": "玛丽", "Anna": "安娜", "Peter": "彼得", "John": "约翰", "Lucy": "露西", "David": "大卫",
    "Li Wei": "李伟", "Wang Fang": "王芳", "Zhang Min": "张敏", "my sister": "我姐姐", "my father": "我爸爸",
    "my mother": "我妈妈", "the teacher": "老师", "my friend": "我的朋友",
}  # fmt: skip
_CITIES = {
    "Beijing": "北京", "Shanghai": "上海", "Guangzhou": "广州", "Hangzhou": "杭州", "London": "伦敦", "Paris": "巴黎",
    "Berlin": "柏林", "New York": "纽约", "Tokyo": "东京", "Xi'an": "西安",
}  # fmt: skip
_PLACES = {
    "bank": "银行", "post office": "邮局", "hospital": "医院", "school": "学校", "museum": "博物馆", "park": "公园",
    "library": "图书馆", "supermarket": "超市", "hotel": "酒店", "restaurant": "饭馆", "cinema": "电影院",
    "zoo": "动物园", "station": "车站", "airport": "机场", "market": "市场", "bookshop": "书店",
    "swimming pool": "游泳池",
}  # fmt: skip
_EVENTS = {
    "meeting": "会议", "exam": "考试", "concert": "音乐会", "match": "比赛", "wedding": "婚礼", "party": "聚会",
    "interview": "面试", "lecture": "讲座", "exhibition": "展览",
}  # fmt: skip
_VEHICLES = {"train": "火车", "bus": "公共汽车", "ship": "船", "plane": "飞机"}
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DAYS = {"today": "今天", "tomorrow": "明天", "the day after tomorrow": "后天"}
_SIDES = {"left": "左", "right": "右"}
_COMPASS = {"north": "北", "south": "南", "east": "东", "west": "西"}
_WAITS = [("minute", "分钟"), ("hour", "个小时")]
_STAYS = [("day", "天"), ("week", "个星期"), ("month", "个月"), ("year", "年")]
_Pair = tuple[str, str]


class _Writer:
    """Writes one phrase: methods return `(English, Chinese)`; of two names of a kind, `_` at the end is the Chinese."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    # --- parts --------------------------------------------------------------------------------------------------

    def of(self, words: dict[str, str]) -> _Pair:
        return self.rng.choice(list(words.items()))

    def two(self, words: dict[str, str]) -> tuple[_Pair, _Pair]:
        first, second = self.rng.sample(list(words.items()), 2)
        return first, second

    def number(self, most: int) -> int:
        """A small number more often than not."""
        return self.rng.choice([1, 2, 2, 3, 4, self.rng.randint(5, most)])

    def counted(self, things: list[_Thing], how_many: int, most: int, *, coloured: bool = False) -> list[_Pair]:
        """Numbers of different things: `two cups of tea`, 两杯茶."""
        return [self.count(thing, self.number(most), coloured=coloured) for thing in self.rng.sample(things, how_many)]

    def count(self, thing: _Thing, number: int, *, coloured: bool = False) -> _Pair:
        colour, colour_noun = self.of(_COLOURS) if coloured and " " not in thing.one else ("", "")
        noun = f"{colour} {thing.one if number == 1 else thing.many}".strip()
        if number == 1:
            words = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        else:
            words = f"{english(number, self.rng)} {noun}"
        return words, f"{chinese(number, counting=True)}{thing.measure}{colour_noun}{thing.noun}"

    def date(self, *, year: bool, weekday: bool = False, past: bool = False) -> _Pair:
        """`March 5, 2024`, 二〇二四年三月五日; with the weekday of that very day."""
        first, days = (datetime.date(1950, 1, 1), 27000) if past else (datetime.date(2025, 1, 1), 3650)
        day = first + datetime.timedelta(days=self.rng.randrange(days))
        month = _MONTHS[day.month - 1]
        words = f"{month} {day.day}" if self.rng.random() < 0.7 else f"{day.day} {month}"
        told = f"{chinese(day.month)}月{chinese(day.day)}日"
        if year:
            words += f", {day.year}" if words.startswith(month) else f" {day.year}"
            told = f"{chinese_digits(day.year)}年{told}"
        if weekday:
            words = f"{_WEEKDAYS[day.weekday()]}, {words}"
            told += f"星期{'一二三四五六日'[day.weekday()]}"
        return words, told

    def clock(self) -> _Pair:
        """A time of day: `half past three in the afternoon`, 下午三点半."""
        hour, minute = self.rng.randint(5, 23), self.rng.choice([0, 15, 30, 45, *range(5, 60, 5), *range(1, 60)])
        noon = hour == 12 and minute == 0
        part = "早上" if hour < 9 else "上午" if hour < 12 else "中午" if noon else "下午" if hour < 18 else "晚上"
        told = f"{part}{chinese((hour - 1) % 12 + 1, counting=True)}点"
        if minute:
            told += "半" if minute == 30 else f"{'零' if minute < 10 else ''}{chinese(minute)}分"
        if noon:
            return "noon", told
        here, following = english((hour - 1) % 12 + 1), english(hour % 12 + 1)
        style = self.rng.random()
        if minute == 0 and style < 0.7:
            words = f"{here} o'clock"
        elif minute in (15, 30) and style < 0.5:
            words = f"{'half' if minute == 30 else 'a quarter'} past {here}"
        elif minute == 45 and style < 0.5 and hour not in (11, 17, 20, 23):  # else another part of the day would follow
            words = f"a quarter to {following}"
        elif style < 0.85:
            words = f"{(hour - 1) % 12 + 1}:{minute:02}"
        else:
            return f"{hour:02}:{minute:02}", told
        part_of = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
        return f"{words} {'at night' if hour > 20 else part_of}", told

    def span(self, units: list[_Pair]) -> _Pair:
        """How long: `two months`, 两个月."""
        (unit, told), number = self.rng.choice(units), self.number(12)
        if unit == "hour" and number > 1 and self.rng.random() < 0.3:
            return f"{english(number)} and a half hours", f"{chinese(number, counting=True)}个半小时"
        article = "an" if unit == "hour" else "a"
        words = f"{article} {unit}" if number == 1 else f"{english(number, self.rng)} {unit}s"
        return words, f"{chinese(number, counting=True)}{told}"

    def amount(self) -> int:
        """A number, of any size with the same chance, often a round one."""
        size = self.rng.choice([10, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000])
        number = self.rng.randint(size, 10 * size - 1)
        if self.rng.random() < 0.5:
            round_to = size // self.rng.choice([1, 10])
            number -= number % max(round_to, 1)
        return number

    def price(self) -> _Pair:
        """`23.50 yuan`, 二十三元五角."""
        if self.rng.random() < 0.3:
            yuan, jiao = self.rng.randint(1, 300), self.rng.randint(1, 9)
            return f"{yuan}.{jiao}0 yuan", f"{chinese(yuan, counting=True)}元{chinese(jiao)}角"
        number = self.rng.choice([self.rng.randint(2, 999), self.rng.randint(2, 99) * 10, self.amount() % 100_000 + 2])
        return self.yuan(number)

    def yuan(self, number: int) -> _Pair:
        return f"{english(number, self.rng)} yuan", f"{chinese(number, counting=True)}元"

    # --- phrases ------------------------------------------------------------------------------------------------

    def dates(self) -> _Pair:
        (event, event_), (who, who_), (place, place_) = map(self.of, (_EVENTS, _NAMES, _PLACES))
        city, city_ = self.of(_CITIES)
        short, short_ = self.date(year=False)
        other, other_ = self.date(year=False)
        next_, next__ = self.date(year=True, weekday=True)
        past, past_ = self.date(year=True, past=True)
        full, full_ = self.date(year=True, weekday=True, past=True)
        forms = [
            (f"The {event} is on {next_}.", f"{event_}在{next__}。"),
            (f"The {event} in {city} is on {short}.", f"{city_}的{event_}在{short_}。"),
            (f"{who} was born on {past}.", f"{who_}是{past_}出生的。"),
            (f"{who} was born in {city} on {past}.", f"{who_}是{past_}在{city_}出生的。"),
            (f"The {place} was built on {past}.", f"{place_}是{past_}建成的。"),
            (f"{who} went to {city} on {full}.", f"{who_}{full_}去了{city_}。"),
        ]
        if short_ != other_:
            forms += [
                (f"Is the {event} on {short} or on {other}?", f"{event_}是{short_}还是{other_}？"),
                (f"We moved the {event} from {short} to {other}.", f"我们把{event_}从{short_}改到了{other_}。"),
            ]
        return self.rng.choice(forms)

    def times(self) -> _Pair:
        (event, event_), (who, who_), (place, place_), (day, day_) = map(self.of, (_EVENTS, _NAMES, _PLACES, _DAYS))
        (vehicle, vehicle_), (city, city_) = map(self.of, (_VEHICLES, _CITIES))
        (clock, clock_), (later, later_) = self.clock(), self.clock()
        (wait, wait_), (stay, stay_) = self.span(_WAITS), self.span(_STAYS)
        forms = [
            (f"The {vehicle} to {city} leaves at {clock}.", f"去{city_}的{vehicle_}{clock_}出发。"),
            (f"The {event} starts at {clock} {day}.", f"{event_}{day_}{clock_}开始。"),
            (f"{who} is waiting for us at the {place} at {clock}.", f"{who_}{clock_}在{place_}等我们。"),
            (f"Please wake me at {clock} {day}.", f"请{day_}{clock_}叫醒我。"),
            (f"Is the {place} still open at {clock}?", f"{place_}{clock_}还开门吗？"),
            (f"{who} has lived in {city} for {stay}.", f"{who_}在{city_}住了{stay_}。"),
            (f"{who} waited at the {place} for {wait}.", f"{who_}在{place_}等了{wait_}。"),
            (f"The {vehicle} from {city} is {wait} late.", f"从{city_}来的{vehicle_}晚点了{wait_}。"),
        ]
        if clock_ != later_:
            forms.append((f"The {place} closes at {clock}, not at {later}.", f"{place_}{clock_}关门，不是{later_}。"))
        return self.rng.choice(forms)

    def orders(self) -> _Pair:
        (one, one_), (two, two_), (three, three_) = self.counted(_FOOD, 3, 12)
        (who, who_), table = self.of(_NAMES), self.rng.randint(1, 40)
        return self.rng.choice(
            [
                (f"I would like {one} and {two}, please.", f"请给我{one_}和{two_}。"),
                (f"{who} would like {one}, {two} and {three}.", f"{who_}想要{one_}、{two_}和{three_}。"),
                (f"We ordered {one}, but we got {two}.", f"我们点了{one_}，可是上了{two_}。"),
                (f"Please bring {one} to table {table}.", f"请把{one_}送到{chinese(table)}号桌。"),
                (f"{who} ordered {one} and {two} for us.", f"{who_}给我们点了{one_}和{two_}。"),
                (f"How much is it for {one} and {two}?", f"{one_}和{two_}一共多少钱？"),
            ]
        )

    def shopping(self) -> _Pair:
        (one, one_), (two, two_) = self.counted(_GOODS, 2, 30, coloured=self.rng.random() < 0.5)
        (who, who_), (place, place_), (price, price_) = self.of(_NAMES), self.of(_PLACES), self.price()
        asked = self.rng.randint(20, 5000)
        (dear, dear_), (cheap, cheap_) = self.yuan(asked), self.yuan(asked * self.rng.randint(5, 9) // 10)
        thing, number, each = self.rng.choice(_GOODS), self.rng.randint(2, 20), self.rng.randint(2, 500)
        many, many_ = self.count(thing, number)
        (single, single_), (total, total_) = self.yuan(each), self.yuan(number * each)
        verb = "is" if one.startswith(("a ", "an ")) else "are"
        return self.rng.choice(
            [
                (f"{who} bought {one} and {two}.", f"{who_}买了{one_}和{two_}。"),
                (f"There {verb} {one} in the {place}.", f"{place_}里有{one_}。"),
                (f"This {thing.one} costs {price}.", f"这{thing.measure}{thing.noun}{price_}。"),
                (f"These {many} cost {price} in all.", f"这{many_}一共{price_}。"),
                (f"{who} paid {price} for {one}.", f"{who_}花{price_}买了{one_}。"),
                (f"{dear} is too expensive; how about {cheap}?", f"{dear_}太贵了，{cheap_}怎么样？"),
                (
                    f"Each {thing.one} is {single}, so {many} are {total}.",
                    f"每{thing.measure}{thing.noun}{single_}，{many_}就是{total_}。",
                ),
            ]
        )

    def numbers(self) -> _Pair:
        (city, city_), (place, place_), (who, who_) = map(self.of, (_CITIES, _PLACES, _NAMES))
        number = self.amount()
        words, told = english(number, self.rng), chinese(number, counting=True)
        room, floor, phone = self.rng.randint(101, 2999), self.rng.randint(2, 30), self.rng.randint(10**6, 10**8 - 1)
        return self.rng.choice(
            [
                (f"The {place} has {words} visitors a year.", f"{place_}每年有{told}名访客。"),
                (f"About {words} people live near the {place}.", f"大约有{told}个人住在{place_}附近。"),
                (f"{words} people in {city} read this book.", f"{city_}有{told}个人读了这本书。"),
                (f"{city} has {words} trees.", f"{city_}有{told}棵树。"),
                (f"{who} is in room {room}.", f"{who_}在{chinese_digits(room)}号房间。"),
                (f"{who} lives on the {ordinal(floor)} floor.", f"{who_}住在{chinese(floor)}楼。"),
                (
                    f"The phone number of the {place} is {phone}.",
                    f"{place_}的电话号码是{chinese_digits(phone)}。",
                ),
            ]
        )

    def directions(self) -> _Pair:
        ((place, place_), (other, other_)), (side, side_), (where, where_) = (
            self.two(_PLACES),
            self.of(_SIDES),
            self.of(_COMPASS),
        )
        nth, bus, stop = self.number(9), self.rng.randint(1, 99), self.number(20)
        metres, km = self.rng.randint(2, 95) * 10, self.rng.randint(2, 60)
        far, far_ = f"{metres} meters", f"{chinese(metres, counting=True)}米"
        crossing, crossing_ = self.of({"traffic light": "红绿灯", "crossing": "路口", "bridge": "桥"})
        measure = "座" if crossing == "bridge" else "个"
        turn = (
            f"Turn {side} at the {ordinal(nth)} {crossing}",
            f"在第{chinese(nth)}{measure}{crossing_}{side_}转",
        )
        return self.rng.choice(
            [
                (f"{turn[0]} and walk {far}.", f"{turn[1]}，再走{far_}。"),
                (f"{turn[0]}; the {place} is on the {side}.", f"{turn[1]}，{place_}在{side_}边。"),
                (f"The {place} is across from the {other}.", f"{place_}在{other_}对面。"),
                (f"The {place} is {far} {where} of the {other}.", f"{place_}在{other_}以{where_}{far_}处。"),
                (
                    f"The {place} is {english(km, self.rng)} kilometers from the {other}.",
                    f"{place_}离{other_}{chinese(km, counting=True)}公里。",
                ),
                (f"How do I get from the {place} to the {other}?", f"从{place_}到{other_}怎么走？"),
                (
                    f"Take bus number {bus} to the {place} and get off at the {ordinal(stop)} stop.",
                    f"坐{chinese(bus)}路公交车去{place_}，在第{chinese(stop)}站下车。",
                ),
                (
                    f"Walk {far} from the {place}, then turn {side} at the {other}.",
                    f"从{place_}走{far_}，然后在{other_}{side_}转。",
                ),
            ]
        )

    def phrase(self) -> _Pair:
        kinds = (self.dates, self.times, self.orders, self.shopping, self.numbers, self.directions)
        words, told = self.rng.choice(kinds)()
        return words[0].upper() + words[1:], told


def synthetic_phrases(count: int, seed: int) -> list[tuple[str, str]]:
    """Writes `count` different synthetic English phrases with their Chinese translations, the same for the same `seed`.

    Dates, times, orders, prices, numbers and directions, of 3 to 20 English words: word order, measure words, 二 or 两,
    ten thousands. These pairs are synthetic: they show that the road works, not how well a model translates what people
    write.

    Args:
        count: how many.
        seed: of `random.Random`, which is the same on every platform.

    Returns:
        `(English, Chinese)` pairs in a random order; no sentence of either side occurs twice.

    Example:
        >>> from tfvllm.data import synthetic_phrases
        >>> pairs = synthetic_phrases(10, seed=1)
        >>> len(dict(pairs)), pairs == synthetic_phrases(10, seed=1)
        (10, True)
    """
    rng = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(pairs) < count:
        words, told = _Writer(rng).phrase()
        if words in seen or told in seen or not SHORTEST <= len(words.split()) <= LONGEST:
            continue
        seen |= {words, told}
        pairs.append((words, told))
    return pairs
