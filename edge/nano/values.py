"""Slot values of the mimo-nano commands: how they are said, what they mean, which are held out."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

from mimo_edge.nano.words import (
    APPS_EN,
    APPS_ZH,
    CHARS_ZH,
    COMMANDS_EN,
    FIRST_EN,
    GIVEN_ZH,
    NOUN_EN,
    PLACES_EN,
    PLACES_ZH,
    ROOMS_EN,
    ROOMS_ZH,
    SURNAMES_ZH,
    SYLLABLES,
    VERB_EN,
    WORDS_ZH,
)

Slot = tuple[str, dict[str, str | int]]
"""Surface text, and the value or values it stands for (key "" when there is only one)."""


def is_held(value: str) -> bool:
    """True for the values kept out of training (1 in 8, by hash, case ignored)."""
    return zlib.crc32(value.lower().encode()) % 8 == 0


_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_DIGITS_ZH = "零一二三四五六七八九"


def number_en(n: int, dash: bool = False) -> str:
    """Spell 0..100 in English."""
    if n == 100:
        return "one hundred"
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (("-" if dash else " ") + _ONES[n % 10] if n % 10 else "")


def number_zh(n: int) -> str:
    """Spell 0..100 in Chinese."""
    if n == 100:
        return "一百"
    tens, ones = divmod(n, 10)
    head = "" if tens == 0 else ("十" if tens == 1 else _DIGITS_ZH[tens] + "十")
    return head + (_DIGITS_ZH[ones] if ones or not tens else "")


def _say(rng: random.Random, lang: str, n: int, digits: float = 0.45) -> str:
    if rng.random() < digits:
        return str(n)
    return number_zh(n) if lang == "zh" else number_en(n, rng.random() < 0.3)


def _int(rng: random.Random, held: bool, low: int, high: int, split: bool = True) -> int:
    while True:
        n = rng.randint(low, high)
        if not split or n < 10 or is_held(str(n)) == held:
            return n


def _pseudo(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3)))).capitalize()


def _name_en(rng: random.Random) -> str:
    first = rng.choice(FIRST_EN) if rng.random() < 0.4 else _pseudo(rng)
    return f"{first} {_pseudo(rng)}" if rng.random() < 0.25 else first


def _chars(rng: random.Random, low: int, high: int) -> str:
    n = rng.randint(low, high)
    if rng.random() < 0.5:
        return "".join(rng.choice(CHARS_ZH) for _ in range(n))
    out = ""
    while len(out) < n:
        out += rng.choice(WORDS_ZH)
    return out


def _name_zh(rng: random.Random) -> str:
    r = rng.random()
    if r < 0.12:
        return rng.choice(
            [
                "妈妈",
                "爸爸",
                "奶奶",
                "爷爷",
                "姐姐",
                "弟弟",
                "老婆",
                "老公",
                "哥哥",
                "妹妹",
                "舅舅",
                "阿姨",
            ]
        )
    s = rng.choice(SURNAMES_ZH)
    if r < 0.3:
        return rng.choice("老小阿") + s
    if r < 0.42:
        return s + rng.choice(["经理", "老师", "医生", "总", "师傅", "教练", "律师"])
    if r < 0.47:
        return _name_en(rng)
    pool = GIVEN_ZH if rng.random() < 0.6 else CHARS_ZH
    return s + "".join(rng.choice(pool) for _ in range(rng.choice((1, 2, 2))))


def _sentence(rng: random.Random, lang: str) -> str:
    """A short message or task: loosely grammatical, so that only copying can get it right."""
    if lang == "zh":
        r = rng.random()
        who = rng.choice(["我", "我们", "他", "她", "你", "孩子", "快递", "老板"])
        if r < 0.35:
            return (
                who
                + rng.choice(["马上", "晚点", "已经", "明天", "现在", "快", "先", "今天"])
                + _chars(rng, 2, 5)
            )
        return (
            _chars(rng, 2, 4)
            + rng.choice(["", "", "了", "一下", "吗", "好"])
            + (_chars(rng, 2, 4) if r > 0.8 else "")
        )
    words = [rng.choice(VERB_EN)]
    for _ in range(rng.randint(1, 3)):
        r = rng.random()
        if r < 0.2:
            words.append(rng.choice(("the", "my", "a", "some", "your", "at", "with", "for", "to")))
        words.append(
            rng.choice(NOUN_EN) if r < 0.7 else _pseudo(rng) if r < 0.85 else rng.choice(VERB_EN)
        )
    if rng.random() < 0.3:
        words.insert(
            0, rng.choice(("I will", "we should", "I am going to", "you can", "they", "she", "we"))
        )
    return " ".join(words)


def _task(rng: random.Random, lang: str) -> str:
    if lang == "zh":
        return rng.choice(
            [
                "买",
                "拿",
                "取",
                "交",
                "还",
                "带",
                "修",
                "洗",
                "订",
                "看",
                "写",
                "查",
                "送",
                "喂",
                "打扫",
                "准备",
                "参加",
            ]
        ) + _chars(rng, 2, 4)
    words = [rng.choice(VERB_EN)]
    if rng.random() < 0.5:
        words.append(rng.choice(("the", "my", "some", "a")))
    words.append(rng.choice(NOUN_EN))
    if rng.random() < 0.35:
        words += [rng.choice(("with", "for", "from")), _pseudo(rng)]
    return " ".join(words)


def _label(rng: random.Random, lang: str) -> str:
    if lang == "zh":
        return _chars(rng, 2, 3)
    return (
        rng.choice(NOUN_EN)
        if rng.random() < 0.6
        else f"{rng.choice(NOUN_EN)} {rng.choice(NOUN_EN)}"
    )


def _title(rng: random.Random, lang: str) -> str:
    if lang == "zh":
        return _chars(rng, 2, 5)
    words = [
        rng.choice(NOUN_EN + VERB_EN) if rng.random() < 0.6 else _pseudo(rng)
        for _ in range(rng.randint(1, 3))
    ]
    return " ".join(w.capitalize() for w in words)


def _place(rng: random.Random, lang: str) -> str:
    if lang == "zh":
        return _chars(rng, 2, 3) + rng.choice(PLACES_ZH)
    head = _pseudo(rng) if rng.random() < 0.6 else rng.choice(NOUN_EN).capitalize()
    number = f"{rng.randint(1, 999)} " if rng.random() < 0.2 else ""
    return f"{number}{head} {rng.choice(PLACES_EN)}"


def _device(rng: random.Random, lang: str) -> str:
    kind_en = [
        "phone",
        "tablet",
        "laptop",
        "TV",
        "printer",
        "camera",
        "console",
        "watch",
        "speaker",
        "iPad",
        "PC",
        "desktop",
        "iPhone",
        "Xbox",
    ]
    kind_zh = [
        "手机",
        "平板",
        "电脑",
        "电视",
        "打印机",
        "摄像头",
        "游戏机",
        "手表",
        "音箱",
        "iPad",
        "笔记本",
        "投影仪",
        "机顶盒",
    ]
    r = rng.random()
    if r < 0.25:
        head = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 4)))
        tail = "".join(rng.choice("0123456789abcdef") for _ in range(rng.randint(1, 4)))
        return f"{head}-{tail}"
    if lang == "zh":
        owner = _name_zh(rng) if r < 0.65 else _chars(rng, 2, 3)
        return owner + ("的" if r < 0.5 else "") + rng.choice(kind_zh)
    if r < 0.6:
        return f"{_name_en(rng)}'s {rng.choice(kind_en)}"
    return f"{rng.choice((*ROOMS_EN, *NOUN_EN))} {rng.choice(kind_en)}"


def _ssid(rng: random.Random, _lang: str) -> str:
    head = _pseudo(rng) if rng.random() < 0.7 else rng.choice(NOUN_EN).capitalize()
    joint = rng.choice(("-", "_", "", "-"))
    tail = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 4)))
    return (
        head
        + joint
        + (
            tail
            if rng.random() < 0.6
            else rng.choice(("Home", "Net", "5G", "Wifi", "Guest", "Lan"))
        )
    )


def _app(rng: random.Random, lang: str) -> str:
    if lang == "zh":
        return rng.choice(APPS_ZH) if rng.random() < 0.3 else _chars(rng, 2, 4)
    return rng.choice(APPS_EN) if rng.random() < 0.3 else _pseudo(rng)


def _room(rng: random.Random, lang: str) -> str:
    if lang == "zh":
        r = rng.random()
        base = rng.choice(ROOMS_ZH)
        if r < 0.12:
            return (
                rng.choice(["二楼", "楼上", "楼下", "一楼", "三楼", "大", "小", "东边", "西边"])
                + base
            )
        if r < 0.35:
            return _chars(rng, 1, 2) + rng.choice(["房", "室", "厅", "间"])
        return base
    r = rng.random()
    if r < 0.12:
        kind = rng.choice(("upstairs", "downstairs", "main", "second", "small", "big"))
        return f"{kind} {rng.choice(ROOMS_EN)}"
    if r < 0.35:
        head = _pseudo(rng).lower() if rng.random() < 0.4 else rng.choice(NOUN_EN)
        return f"{head} room"
    return rng.choice(ROOMS_EN)


def _door(rng: random.Random, lang: str) -> str:
    if lang == "zh":
        return (rng.choice(ROOMS_ZH) if rng.random() < 0.5 else _chars(rng, 1, 2)) + "门"
    head = rng.choice(("front", "back", "side", "main", *ROOMS_EN, *NOUN_EN))
    return f"{head} {rng.choice(('door', 'door', 'gate'))}"


def _time(rng: random.Random, lang: str, held: bool) -> Slot:
    while True:
        hour = rng.randint(0, 23)
        minute = rng.choice((0, 0, 30, 15, 45, rng.randint(0, 11) * 5, rng.randint(0, 59)))
        value = f"{hour:02d}:{minute:02d}"
        if is_held(value) == held:
            break
    if rng.random() < 0.2:
        return (value if lang == "en" else rng.choice((value, f"{hour}点{minute:02d}分"))), {
            "": value
        }
    if lang == "zh":
        part = (
            "凌晨"
            if hour < 5
            else rng.choice(("早上", "上午")) if hour < 11 else "上午" if hour < 12
            else "中午" if hour == 12 else "下午" if hour < 18 else "晚上"
        )  # fmt: skip
        h = hour if hour <= 12 else hour - 12
        digits = rng.random() < 0.35
        hs = str(h) if digits else ("两" if h == 2 else number_zh(h))
        if minute == 0:
            ms = rng.choice(("", "整"))
        elif minute == 30 and rng.random() < 0.7:
            ms = "半"
        elif minute == 15 and rng.random() < 0.4:
            ms = "一刻"
        elif digits:
            ms = f"{minute}" + rng.choice(("分", ""))
        else:
            ms = (
                ("零" if minute < 10 else "")
                + number_zh(minute)
                + ("分" if minute < 11 else rng.choice(("分", "")))
            )
        return f"{part}{hs}点{ms}", {"": value}
    if hour == 12 and minute == 0 and rng.random() < 0.5:
        return "noon", {"": value}
    h = hour % 12 or 12
    half = "am" if hour < 12 else "pm"
    style = rng.random()
    if style < 0.6 or hour < 3 or hour == 12:
        tail = f" {half}"
    else:
        part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
        tail = f" in the {part}"
    if rng.random() < 0.4:
        return (f"{h}:{minute:02d}{tail}" if minute or rng.random() < 0.3 else f"{h}{tail}"), {
            "": value
        }
    spoken = number_en(h)
    if minute == 0:
        return spoken + (" o'clock" if tail[1] == "i" and rng.random() < 0.5 else "") + tail, {
            "": value
        }
    if minute == 30 and rng.random() < 0.4:
        return f"half past {spoken}{tail}", {"": value}
    if minute == 15 and rng.random() < 0.4:
        return f"quarter past {spoken}{tail}", {"": value}
    return f"{spoken} {'oh ' if minute < 10 else ''}{number_en(minute)}{tail}", {"": value}


def _duration(rng: random.Random, lang: str, held: bool, units: Sequence[str]) -> Slot:
    unit = rng.choice(units)
    n = _int(rng, held, 1, {"seconds": 90, "minutes": 90, "hours": 24}[unit])
    if lang == "zh":
        said = _say(rng, lang, n)
        said = "两" if said == "二" else said
        return said + {"seconds": "秒", "minutes": "分钟", "hours": rng.choice(("个小时", "小时"))}[
            unit
        ], {
            "duration": n,
            "unit": unit,
        }
    if n == 1 and rng.random() < 0.5:
        return ("an hour" if unit == "hours" else f"a {unit[:-1]}"), {"duration": 1, "unit": unit}
    return f"{_say(rng, lang, n)} {unit if n > 1 else unit[:-1]}", {"duration": n, "unit": unit}


_CHOICES: dict[str, dict[str, dict[str, Sequence[str]]]] = {
    "zone": {
        "en": {
            "driver": ("driver side", "driver's side", "driver zone", "driver"),
            "passenger": ("passenger side", "passenger's side", "passenger zone", "passenger"),
            "rear": ("rear", "back seats", "rear zone", "back"),
        },
        "zh": {
            "driver": ("主驾", "驾驶位", "主驾驶", "主驾这边"),
            "passenger": ("副驾", "副驾驶", "副驾那边", "副驾位"),
            "rear": ("后排", "后座", "车后排", "后面"),
        },
    },
    "seat": {
        "en": {
            "driver": ("driver", "driver's", "driver side"),
            "passenger": ("passenger", "passenger's", "passenger side"),
            "rear": ("rear", "back"),
        },
        "zh": {
            "driver": ("主驾", "驾驶位", "主驾驶"),
            "passenger": ("副驾", "副驾驶", "副驾位"),
            "rear": ("后排", "后座"),
        },
    },
    "window": {
        "en": {
            "driver": ("driver window", "driver's window", "driver side window"),
            "passenger": ("passenger window", "passenger's window", "passenger side window"),
            "rear_left": ("rear left window", "left rear window", "back left window"),
            "rear_right": ("rear right window", "right rear window", "back right window"),
            "all": ("windows", "car windows", "all windows", "all the windows"),
        },
        "zh": {
            "driver": ("主驾车窗", "主驾的窗户", "驾驶位车窗", "主驾驶窗"),
            "passenger": ("副驾车窗", "副驾的窗户", "副驾驶车窗", "副驾驶窗"),
            "rear_left": ("左后车窗", "左后窗", "后排左边的车窗"),
            "rear_right": ("右后车窗", "右后窗", "后排右边的车窗"),
            "all": ("所有车窗", "全部车窗", "车窗", "四个车窗"),
        },
    },
    "side": {
        "en": {
            "front": ("front", "windshield", "front window"),
            "rear": ("rear", "back window", "rear window"),
        },
        "zh": {"front": ("前挡风玻璃", "前挡", "前窗"), "rear": ("后挡风玻璃", "后挡", "后窗")},
    },
    "avoid": {
        "en": {
            "tolls": ("tolls", "toll roads", "paying tolls"),
            "highways": ("highways", "the highway", "freeways"),
        },
        "zh": {"tolls": ("收费路段", "收费站", "收费"), "highways": ("高速", "高速公路", "高速路")},
    },
    "prio": {
        "en": {
            "high": ("high", "top", "highest"),
            "normal": ("normal", "medium", "default"),
            "low": ("low", "lowest", "bottom"),
        },
        "zh": {
            "high": ("高", "最高", "优先"),
            "normal": ("普通", "正常", "中等"),
            "low": ("低", "最低", "靠后"),
        },
    },
    "color": {
        "en": {
            "red": ("red",),
            "green": ("green",),
            "blue": ("blue",),
            "purple": ("purple", "violet"),
            "warm": ("warm", "warm white", "cosy"),
            "white": ("white", "cold white"),
        },
        "zh": {
            "red": ("红色", "红"),
            "green": ("绿色", "绿"),
            "blue": ("蓝色", "蓝"),
            "purple": ("紫色", "紫"),
            "warm": ("暖色", "暖光", "暖黄色"),
            "white": ("白色", "冷白色", "白"),
        },
    },
}

FREE_TEXT: dict[str, Callable[[random.Random, str], str]] = {
    "contact": lambda rng, lang: _name_zh(rng) if lang == "zh" else _contact_en(rng),
    "artist": lambda rng, lang: (
        _name_zh(rng) if lang == "zh" and rng.random() < 0.8 else _name_en(rng)
    ),
    "text": _sentence,
    "task": _task,
    "label": _label,
    "title": _title,
    "place": _place,
    "device": _device,
    "ssid": _ssid,
    "app": _app,
    "room": _room,
    "door": _door,
}


def _contact_en(rng: random.Random) -> str:
    if rng.random() < 0.12:
        return rng.choice(["mom", "dad", "grandma", "grandpa"])
    return _name_en(rng)


_ANY_EN = sorted(
    {
        *FIRST_EN,
        *NOUN_EN,
        *VERB_EN,
        *PLACES_EN,
        *APPS_EN,
        *COMMANDS_EN,
        *" ".join(ROOMS_EN).split(),
    }
)
_ANY_ZH = sorted(
    {*CHARS_ZH, *SURNAMES_ZH, *GIVEN_ZH, *"".join((*ROOMS_ZH, *WORDS_ZH, *APPS_ZH, *PLACES_ZH))}
)
_LETTERS, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


def _wild(rng: random.Random, lang: str) -> str:
    """Something nobody would guess: any words, characters or letters, in any order."""
    if lang == "zh" and rng.random() < 0.85:
        chars = [rng.choice(_ANY_ZH) for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 5)))]
        if rng.random() < 0.2:  # said twice, it is copied twice
            at = rng.randrange(len(chars))
            chars.insert(at, chars[at])
        return "".join(chars)
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        r = rng.random()
        if r < 0.4:
            word = rng.choice(_ANY_EN)
        elif r < 0.7:
            word = _pseudo(rng)
        else:
            word = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 7)))
        if rng.random() < 0.1:
            word += rng.choice(("", "-", "_")) + "".join(
                rng.choice(_DIGITS) for _ in range(rng.randint(1, 3))
            )
        words.append(word.capitalize() if rng.random() < 0.5 else word.lower())
    return " ".join(words)


def _free(rng: random.Random, slot: str, lang: str, held: bool) -> str:
    """A value of a free-text slot. In training half of them belong to another slot or to none:
    what follows "open" is to be copied because of where it stands, not because it is known."""
    r = 1.0 if held else rng.random()
    if r < 0.3:
        return _wild(rng, lang)
    if r < 0.45 and lang == "en" and slot in ("room", "door"):
        kinds = ("room", "room", "hall", "corner") if slot == "room" else ("door", "gate")
        return f"{rng.choice(_ANY_EN).lower()} {rng.choice(kinds)}"
    return FREE_TEXT[rng.choice(list(FREE_TEXT)) if r < 0.5 else slot](rng, lang)


def fill(rng: random.Random, slot: str, lang: str, held: bool) -> Slot:
    """Draw a value for a slot; held-out or training values where the slot has enough of them to
    split.
    """
    if slot in FREE_TEXT:
        while True:
            value = _free(rng, slot, lang, held)
            if is_held(value) == held:
                return value, {"": value}
    if slot in _CHOICES:
        table = _CHOICES[slot][lang]
        key = rng.choice(list(table))
        return rng.choice(table[key]), {"": key}
    if slot == "time":
        return _time(rng, lang, held)
    if slot == "dur":
        return _duration(rng, lang, held, ("seconds", "minutes", "minutes", "hours"))
    if slot == "long":
        return _duration(rng, lang, held, ("minutes", "hours"))
    low, high = {"pct": (0, 100), "deg": (16, 30), "level": (0, 3)}[slot]
    n = _int(rng, held, low, high, split=slot == "pct")
    if slot == "pct" and lang == "zh" and rng.random() < 0.5:
        return (f"百分之{_say(rng, lang, n, 0.3)}" if rng.random() < 0.6 else f"{n}%"), {"": n}
    if slot == "pct" and lang == "en" and rng.random() < 0.6:
        return (f"{_say(rng, lang, n)} percent" if rng.random() < 0.7 else f"{n}%"), {"": n}
    return _say(rng, lang, n), {"": n}
