"""Phrasings of the mimo-nano commands: for each tool and language, a training list and a held-out
list.

The syntax is described in `commands`. `phrasings_more.txt` adds training phrasings to the frames
here; they were written without sight of the held-out ones, and those that expand to one were
dropped. A held-out phrasing shares its words with the training ones (a model trained from nothing
cannot know a word it has never seen) but is none of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources


@dataclass(frozen=True)
class Frame:
    """One meaning: a tool with arguments (`$slot` copies from the text) and how people say it."""

    tool: str
    lang: str
    args: dict[str, str | int]
    train: tuple[str, ...]
    held: tuple[str, ...]


FRAMES: list[Frame] = []


def _add(tool: str, lang: str, args: dict[str, str | int], train: str, held: str) -> None:
    def lines(text: str) -> tuple[str, ...]:
        return tuple(line.strip() for line in text.strip().splitlines())

    FRAMES.append(Frame(tool, lang, args, lines(train), lines(held)))


# --- phone --------------------------------------------------------------------------------------

_add(
    "set_alarm",
    "en",
    {"time": "$time"},
    """
    (set|create|add|make) (an|the|my) alarm (for|at) {time}
    wake me (up|) at {time}
    wake me at {time} (with an alarm|)
    ~I need an alarm (at|for) {time}
    ~alarm (for|at) {time}
    get me up at {time}
    have an alarm (go off|ring) at {time}
    ~at {time} (wake me up|get me up)
    set the alarm clock (to|for) {time}
    schedule my alarm clock (to|for) {time}
    ~I have to be up (at|by) {time}
    """,
    """
    (put|schedule) an alarm (on|) (for|at) {time}
    ~I have to get up at {time}
    ~at {time} I need an alarm
    let the alarm ring at {time}
    """,
)
_add(
    "set_alarm",
    "en",
    {"time": "$time", "label": "$label"},
    """
    (set|create|add) an alarm (for|at) {time} (called|named|labelled) {label}
    set an alarm called {label} (for|at) {time}
    (set|add) an alarm (for|at) {time}, label {label}
    wake me up at {time} for {label}
    add an alarm labelled {label} at {time}
    """,
    """
    make an alarm (named|called) {label} for {time}
    create an alarm at {time} with the label {label}
    """,
)
_add(
    "set_alarm",
    "zh",
    {"time": "$time"},
    """
    (设|定|设置|订)(个|一个){time}的闹钟
    {time}(叫我|叫醒我|喊我)(起床|)
    {time}(设|定)(个|一个)闹钟
    (定|设)闹钟到{time}
    ~我要{time}起床,定个闹钟
    闹钟(定|设)在{time}
    ~明天{time}叫我起床
    把闹钟(调|设)到{time}
    将闹钟(调|设)到{time}
    """,
    """
    (加|添加)一个{time}的闹钟
    在{time}的时候(叫醒我|叫我)
    把闹钟定在{time}
    ~我{time}要起床
    """,
)
_add(
    "set_alarm",
    "zh",
    {"time": "$time", "label": "$label"},
    """
    (设|定)一个{time}的闹钟,(名字叫|标签是|叫){label}
    {time}叫我,备注{label}
    设个{time}的{label}闹钟
    定个叫{label}的闹钟,{time}
    """,
    """
    定一个{label}闹钟,时间{time}
    {time}设个闹钟,备注{label}
    """,
)
_add(
    "set_timer",
    "en",
    {"duration": "$dur.duration", "unit": "$dur.unit"},
    """
    (set|start|create) a timer for {dur}
    (set|start) a {dur} timer
    timer for {dur}
    count down {dur}
    start a countdown (of|for) {dur}
    start counting down from {dur}
    ~I need a timer for {dur}
    set the timer to {dur}
    (set|adjust) the countdown to {dur}
    let me know (when|after) {dur} (have passed|are over|is up)
    """,
    """
    put on a timer for {dur}
    begin a countdown of {dur}
    make a timer, {dur}
    set a countdown for {dur}
    """,
)
_add(
    "set_timer",
    "zh",
    {"duration": "$dur.duration", "unit": "$dur.unit"},
    """
    (设|定)(个|一个){dur}的(计时器|倒计时|定时器)
    倒计时{dur}
    计时{dur}
    (开始|启动){dur}(的|)倒计时
    {dur}后提醒我
    定时{dur}
    定时,时间{dur}
    设置(计时器|倒计时){dur}
    过{dur}(叫我|提醒我)
    """,
    """
    来(个|一个){dur}的倒计时
    {dur}之后叫我
    (开|启动)一个{dur}的计时器
    """,
)
_add(
    "send_message",
    "en",
    {"contact": "$contact", "text": "$text"},
    """
    (text|message) {contact} (saying|that) {text}
    send (a message|a text) to {contact} saying {text}
    tell {contact} that {text}
    send {contact} (a message|a text): {text}
    let {contact} know that {text}
    write to {contact}: {text}
    place a message to {contact}: {text}
    (send|write) a message to {contact}: {text}
    message to {contact}: {text}
    text {contact}: {text}
    """,
    """
    write {contact} a message saying {text}
    send a text to {contact}: {text}
    (write|send) to {contact} that {text}
    tell {contact}: {text}
    """,
)
_add(
    "send_message",
    "zh",
    {"contact": "$contact", "text": "$text"},
    """
    给{contact}(发|发个|发条|发一条)(消息|短信|信息)(说|:|,内容是){text}
    告诉{contact}:{text}
    跟{contact}说{text}
    (发|发个|发一条)(消息|短信)给{contact}(说|:){text}
    通知{contact},{text}
    短信{contact}:{text}
    发信息给{contact},内容是{text}
    写(个|一条|一个)(消息|短信|信息)给{contact}:{text}
    给{contact}留言说{text}
    """,
    """
    给{contact}写(个|条)(短信|消息):{text}
    告诉{contact}说{text}
    (用短信|发消息)通知{contact}:{text}
    """,
)
_add(
    "call_contact",
    "en",
    {"contact": "$contact"},
    """
    (call|phone|ring|dial) {contact}
    (give|make) {contact} a call
    (start|make) a (phone|) call (to|with) {contact}
    call {contact} (for me|on the phone)
    ~I (want|need|have) to (call|talk to|speak to) {contact}
    get {contact} on the (phone|line)
    dial {contact}'s number
    put me through to {contact}
    """,
    """
    place a call to {contact}
    give {contact} a ring
    ~I want to phone {contact}
    call up {contact}
    """,
)
_add(
    "call_contact",
    "zh",
    {"contact": "$contact"},
    """
    (给|跟){contact}打(个|)电话
    打(个|)电话给{contact}
    (呼叫|拨打|拨给|打给){contact}
    拨打{contact}的电话
    ~我(要|想)(跟|和){contact}(通话|打电话)
    联系{contact},打个电话
    (接通|拨通){contact}(的电话|)
    """,
    """
    给{contact}拨个电话
    和{contact}通个电话
    ~我要打给{contact}
    """,
)
_add(
    "play_music",
    "en",
    {"title": "$title", "artist": "$artist"},
    """
    play {title} by {artist}
    (play|put on) the song {title} by {artist}
    ~I want to (hear|listen to) {title} by {artist}
    put on {title} by {artist}
    (begin|keep) playing {title} by {artist}
    ~let's (hear|listen to) {title} by {artist}
    play {artist}'s {title}
    """,
    """
    start playing {title} by {artist}
    ~I want to hear the song {title} by {artist}
    play the track {title} from {artist}
    """,
)
_add(
    "play_music",
    "en",
    {"title": "$title"},
    """
    play the (song|track) {title}
    put on the (song|track) {title}
    ~I want to (hear|listen to) the song {title}
    play the song called {title}
    play me the track {title}
    """,
    """
    start the song {title}
    put on the song called {title}
    """,
)
_add(
    "play_music",
    "en",
    {"artist": "$artist"},
    """
    play (something|some music|songs|music) (by|from) {artist}
    put on (some music|songs|something) by {artist}
    (begin|keep) playing (songs|music) by {artist}
    ~I want to (hear|listen to) (songs|music) by {artist}
    play an artist called {artist}
    """,
    """
    start playing songs by {artist}
    put on music from {artist}
    """,
)
_add(
    "play_music",
    "zh",
    {"title": "$title", "artist": "$artist"},
    """
    (播放|放|来)(一首|首|){artist}的{title}
    (放|播放)歌手{artist}的歌{title}
    ~我(想|要)听{artist}的{title}
    (播放|放)歌曲{title},歌手{artist}
    听{artist}唱的{title}
    """,
    """
    播放{artist}唱的{title}
    点一首{artist}的{title}
    """,
)
_add(
    "play_music",
    "zh",
    {"title": "$title"},
    """
    (播放|放)(一首|)歌曲{title}
    放一首歌,歌名是{title}
    ~我(想|要)听歌曲{title}
    (播放|放)一首歌叫{title}
    来首歌,{title}
    """,
    """
    来一首歌叫{title}
    听歌曲{title}
    """,
)
_add(
    "play_music",
    "zh",
    {"artist": "$artist"},
    """
    (播放|放|来)(几首|点|一些)(歌手|){artist}的歌
    ~我(想|要)听{artist}的歌
    (播放|放)歌手{artist}的音乐
    来点{artist}的音乐
    """,
    """
    放些{artist}的音乐
    听歌手{artist}的歌
    """,
)
_add(
    "add_reminder",
    "en",
    {"text": "$task", "time": "$time"},
    """
    remind me to {task} at {time}
    remind me at {time} to {task}
    schedule a reminder to {task} (at|for) {time}
    (add|set|create) a reminder to {task} at {time}
    ~at {time} remind me to {task}
    (set|add) a reminder for {time} to {task}
    ~don't let me forget to {task} at {time}
    """,
    """
    make a reminder to {task} at {time}
    create a reminder at {time} to {task}
    """,
)
_add(
    "add_reminder",
    "en",
    {"text": "$task"},
    """
    remind me to {task}
    (add|set|create) a reminder to {task}
    ~don't let me forget to {task}
    put a reminder to {task} on my list
    add a reminder: {task}
    """,
    """
    make a reminder to {task}
    ~I need a reminder to {task}
    """,
)
_add(
    "add_reminder",
    "zh",
    {"text": "$task", "time": "$time"},
    """
    {time}提醒我{task}
    提醒我{time}{task}
    {time}的时候提醒我{task}
    (添加|加|设)(一个|个)提醒,{time}{task}
    (设|加)个{time}的提醒,{task}
    到{time}(记得|)提醒我{task}
    """,
    """
    在{time}提醒我(要|){task}
    (加|添加)一个{time}的提醒:{task}
    """,
)
_add(
    "add_reminder",
    "zh",
    {"text": "$task"},
    """
    提醒我{task}
    (添加|加|设)(一个|个)提醒(:|,){task}
    (别让我忘了|记得提醒我){task}
    记一下提醒,{task}
    """,
    """
    设置提醒:{task}
    到时候提醒我{task}
    """,
)
_add(
    "open_app",
    "en",
    {"app": "$app"},
    """
    (open|launch|start) (the app|the application) {app}
    (open|launch|start) (the|) {app} app
    (open|launch) {app}
    (bring up|show me) the {app} app
    ~I want to (use|open) {app}
    start {app}
    """,
    """
    bring up {app}
    show me {app}
    run the {app} app
    """,
)
_add(
    "open_app",
    "zh",
    {"app": "$app"},
    """
    (打开|启动|运行)(应用|软件|){app}
    (打开|启动){app}(应用|软件|这个应用)
    ~我(要|想)用{app}
    (进入|开启)(应用|){app}
    把{app}(应用|)打开
    """,
    """
    运行一下{app}
    开一下{app}应用
    """,
)
_add(
    "set_volume",
    "en",
    {"percent": "$pct"},
    """
    (set|turn|change) the volume to {pct}
    volume (to|at|) {pct}
    (put|make) the volume {pct}
    turn the (sound|volume) (up|down|) to {pct}
    change the sound level to {pct}
    ~I want the volume at {pct}
    keep the (volume|sound) at {pct}
    """,
    """
    put the volume at {pct}
    set the sound to {pct}
    adjust the volume to {pct}
    """,
)
_add(
    "set_volume",
    "zh",
    {"percent": "$pct"},
    """
    (把|)音量(调到|设到|调成|设为|开到){pct}
    (调|设)音量(到|为){pct}
    声音(调到|开到){pct}
    把声音(调成|设为|设到){pct}
    将声音(调成|设为|开到){pct}
    音量{pct}
    """,
    """
    把声音调到{pct}
    ~音量我要{pct}
    将音量设为{pct}
    """,
)

# --- car ----------------------------------------------------------------------------------------

_add(
    "set_temperature",
    "en",
    {"zone": "$zone", "degrees": "$deg"},
    """
    set the {zone} (temperature|climate|air conditioning) to {deg} (degrees|)
    set the (temperature|climate|ac) for the {zone} to {deg} (degrees|)
    make (it|the car|) {deg} degrees (for|on|in) the {zone}
    {zone} (temperature|climate|ac) to {deg} (degrees|)
    change the {zone} temperature to {deg} (degrees|)
    ~I want {deg} degrees (on|for) the {zone} in the car
    turn the {zone} (ac|climate) to {deg} (degrees|)
    set the ac to {deg} degrees (for|on) the {zone}
    """,
    """
    adjust the {zone} (climate|temperature) to {deg} degrees
    put the car ac at {deg} degrees for the {zone}
    change the climate for the {zone} to {deg}
    """,
)
_add(
    "set_temperature",
    "zh",
    {"zone": "$zone", "degrees": "$deg"},
    """
    (把|){zone}(的|)(温度|空调)(调到|设为|调成|设到){deg}度
    {zone}(空调|温度){deg}度
    {zone}(太热了|太冷了|有点热|有点冷),调到{deg}度
    (设置|调)(车里|车内|){zone}温度(到|为){deg}度
    给{zone}开{deg}度(的空调|)
    空调{zone}(调到|设到){deg}度
    空调{zone}那边{deg}度
    将{zone}温度(调到|设到){deg}度
    """,
    """
    让{zone}温度保持{deg}度
    将{zone}的空调设成{deg}度
    {zone}那里温度调成{deg}度
    """,
)
_add(
    "set_temperature",
    "en",
    {"degrees": "$deg"},
    """
    (set|change) the car (temperature|climate|ac) to {deg} (degrees|)
    set the (air conditioning|ac) in the car to {deg} (degrees|)
    make the car {deg} degrees
    car (temperature|ac) (to|at|) {deg} (degrees|)
    ~it is too (hot|cold) in the car, make it {deg} degrees
    turn the car ac to {deg} (degrees|)
    ~I want {deg} degrees in the car
    """,
    """
    adjust the car temperature to {deg} (degrees|)
    put the air conditioning in the car at {deg} degrees
    ~the car is too (hot|cold), set it to {deg} degrees
    """,
)
_add(
    "set_temperature",
    "zh",
    {"degrees": "$deg"},
    """
    (把|)(车里|车内|车上)(的|)(温度|空调)(调到|设为|调成|设到){deg}度
    (车里|车内)(空调|温度){deg}度
    (车里|车内)(太热了|太冷了|有点热|有点冷),调到{deg}度
    车载空调(调到|设到|开到){deg}度
    (设置|调)车内温度(到|为){deg}度
    """,
    """
    将车里的温度设成{deg}度
    让车内温度保持{deg}度
    把车载空调设为{deg}度
    """,
)
for _win, _act, _en, _enh, _zh, _zhh in (
    (
        "$window",
        "open",
        """
    open the {window}
    (roll|wind|put) down the {window}
    (roll|wind) the {window} down
    let the {window} down
    ~I want the {window} opened
    ~I need some air, open the {window}
    ~it is hot, (open|lower) the {window}
    lower the {window}
    """,
        """
    put the {window} down
    (get|have) the {window} open
    ~I need some air, lower the {window}
    """,
        """
    (打开|开){window}
    把{window}(打开|降下来|开开|摇下来)
    将{window}(降下来|开开|摇下来)
    {window}(开一下|打开|降下来)
    降下{window}
    ~有点闷,(打开|开){window}
    """,
        """
    将{window}打开
    开一下{window}
    ~有点闷,把{window}降下来
    """,
    ),
    (
        "$window",
        "close",
        """
    (close|shut) the {window}
    (roll|wind|put) up the {window}
    (roll|wind) the {window} up
    ~it is (windy|cold|raining), (close|shut) the {window}
    raise the {window}
    """,
        """
    put the {window} up
    (get|have) the {window} closed
    ~it is raining, raise the {window}
    """,
        """
    (关上|关闭|关){window}
    把{window}(关上|升上去|关了|摇上去)
    将{window}(升上去|关了|摇上去)
    {window}(关一下|关上|升上去)
    升起{window}
    ~(下雨了|风太大),(关上|关){window}
    """,
        """
    将{window}关上
    关一下{window}
    ~下雨了,把{window}升上去
    """,
    ),
):
    _add("set_window", "en", {"window": _win, "action": _act}, _en, _enh)
    _add("set_window", "zh", {"window": _win, "action": _act}, _zh, _zhh)
_add(
    "navigate_to",
    "en",
    {"destination": "$place"},
    """
    (navigate|drive|take me) to {place}
    (start|begin) navigation to {place}
    (show|find) (me|) the way to {place}
    ~I want to (go|drive|get) to {place}
    (give me|get me) directions to {place}
    set the destination to {place}
    plan a trip to {place}
    ~I need (the|a) route to {place}
    ~let's drive to {place}
    bring me to {place}
    how do I get to {place}
    """,
    """
    find me directions to {place}
    start the navigation for {place}
    ~let's go to {place}
    plan a route to {place}
    """,
)
_add(
    "navigate_to",
    "en",
    {"destination": "$place", "avoid": "$avoid"},
    """
    (navigate|drive|take me) to {place} (without|avoiding) {avoid}
    (navigate|drive) to {place} and avoid {avoid}
    start navigation to {place} (avoiding|without) {avoid}
    ~I want to go to {place} without {avoid}
    directions to {place}, avoid {avoid}
    avoid {avoid} and take me to {place}
    """,
    """
    find the way to {place} avoiding {avoid}
    bring me to {place} without {avoid}
    """,
)
_add(
    "navigate_to",
    "zh",
    {"destination": "$place"},
    """
    (导航|开车|带我)(去|到){place}
    ~我(要|想)去{place}
    去{place}(怎么走|的路线)
    (开始|)导航,(去|目的地){place}
    把目的地(设为|设成|设到){place}
    (查|找)(一下|)(去|到){place}的路
    送我去{place}
    前往{place}
    规划路线,(去|到){place}
    """,
    """
    规划(去|到){place}的路线
    目的地设成{place}
    带我前往{place}
    """,
)
_add(
    "navigate_to",
    "zh",
    {"destination": "$place", "avoid": "$avoid"},
    """
    (导航|开车)(去|到){place},(避开|不走){avoid}
    (避开|不走){avoid}(去|到){place}
    ~我(要|想)去{place},(不要走|避开|别走){avoid}
    带我去{place},不走{avoid}
    """,
    """
    去{place}的路线,避开{avoid}
    导航到{place},别走{avoid}
    """,
)
_add(
    "set_seat_heating",
    "en",
    {"seat": "$seat", "level": "$level"},
    """
    (set|turn|put) the {seat} seat heating to (level|) {level}
    (set|turn) (the|) {seat} seat (heat|heating|heater) to level {level}
    (heat|warm) the {seat} seat (to|at) level {level}
    {seat} seat (heat|heating|heater) (to|on|at|) level {level}
    change the heating of the {seat} seat to {level}
    ~the {seat} seat is cold, heating to level {level}
    """,
    """
    adjust the {seat} seat heating to {level}
    put the heater of the {seat} seat on level {level}
    warm up the {seat} seat with level {level}
    """,
)
_add(
    "set_seat_heating",
    "zh",
    {"seat": "$seat", "level": "$level"},
    """
    (把|){seat}(的|)座椅加热(调到|开到|设为|设到){level}(挡|档|级)
    {seat}(座椅|)加热{level}(挡|档|级)
    (打开|开){seat}座椅加热{level}(挡|档|级)
    {seat}座椅(有点冷|太凉了),加热(开到|调到){level}(挡|档|级)
    座椅加热,{seat},{level}(挡|档|级)
    """,
    """
    将{seat}座椅加热调成{level}(挡|档)
    给{seat}座椅加热,{level}(挡|档|级)
    """,
)
for _state, _en, _enh, _zh, _zhh in (
    (
        "on",
        """
    (turn|switch) on the {side} defrost
    (turn|switch) the {side} (defrost|defroster) on
    (start|enable) the {side} (defrost|defroster)
    defrost the {side}
    {side} defrost on
    ~the {side} is (foggy|frozen), defrost (on|it)
    clear the {side} with the defroster
    """,
        """
    (activate|get) the {side} (defrost|defroster) going
    put the {side} defroster on
    ~I can't see, {side} defrost on
    """,
        """
    (打开|开启|开){side}(除霜|除雾)
    {side}(除霜|除雾)(打开|开启|开一下)
    给{side}(除霜|除雾)
    把{side}(的|)(除霜|除雾)(打开|开启)
    将{side}的除霜(打开|开启)
    ~{side}(起雾了|结霜了),除一下
    """,
        """
    启动{side}(除霜|除雾)
    ~{side}看不清,开除霜
    将{side}的除雾打开
    """,
    ),
    (
        "off",
        """
    (turn|switch) off the {side} defrost
    (turn|switch) the {side} (defrost|defroster) off
    (stop|disable) the {side} (defrost|defroster)
    {side} defrost off
    stop defrosting the {side}
    ~the {side} is clear, defrost off
    """,
        """
    put the {side} defroster off
    shut off the {side} defrost
    ~I don't need the {side} defrost, turn it off
    """,
        """
    (关闭|关掉|关){side}(除霜|除雾)
    {side}(除霜|除雾)(关掉|关闭|关了)
    把{side}(的|)(除霜|除雾)(关掉|关闭|关了)
    停止{side}(除霜|除雾)
    不用{side}(除霜|除雾)了
    """,
        """
    停掉{side}除霜
    将{side}的除雾关掉
    ~{side}除霜不用了
    """,
    ),
):
    _add("set_defrost", "en", {"side": "$side", "state": _state}, _en, _enh)
    _add("set_defrost", "zh", {"side": "$side", "state": _state}, _zh, _zhh)
_add(
    "set_trunk",
    "en",
    {"action": "open"},
    """
    (open|pop) the (trunk|boot)
    (open|pop) the car (trunk|boot)
    (trunk|boot) open
    ~I need to (load|put something in) the (trunk|boot), open it
    lift the (trunk|boot) lid
    unlock and open the trunk
    get the trunk open
    """,
    """
    have the (trunk|boot) opened
    lift the car trunk
    ~I need the trunk, open it
    """,
)
_add(
    "set_trunk",
    "en",
    {"action": "close"},
    """
    (close|shut) the (trunk|boot)
    (close|shut) the car (trunk|boot)
    (trunk|boot) (closed|shut)
    ~I am done (loading|with the trunk), close it
    put the trunk lid down
    get the trunk closed
    """,
    """
    have the (trunk|boot) closed
    put down the trunk lid
    ~I am done with the boot, shut it
    """,
)
_add(
    "set_trunk",
    "zh",
    {"action": "open"},
    """
    (打开|开|开启)(后备箱|行李箱|尾门)
    把(后备箱|行李箱|尾门)(打开|开开)
    将行李箱(打开|开开)
    (后备箱|尾门)(开一下|打开)
    ~我要放(东西|行李),开后备箱
    弹开(后备箱|尾门)
    """,
    """
    将(后备箱|尾门)打开
    ~我要拿东西,打开尾门
    开一下(行李箱|尾门)
    """,
)
_add(
    "set_trunk",
    "zh",
    {"action": "close"},
    """
    (关上|关|关闭)(后备箱|行李箱|尾门)
    把(后备箱|行李箱|尾门)(关上|关了|合上)
    将行李箱(关上|关了|合上)
    (后备箱|尾门)(关一下|关上)
    ~东西(放好了|拿完了),关后备箱
    合上(后备箱|尾门)
    """,
    """
    将(后备箱|尾门)关上
    ~行李放好了,关上尾门
    关一下(行李箱|尾门)
    """,
)

# --- router -------------------------------------------------------------------------------------

_add(
    "set_guest_wifi",
    "en",
    {"state": "on"},
    """
    (turn|switch) on the guest (wifi|wi-fi|network)
    (turn|switch) the guest (wifi|wi-fi|network) on
    (enable|start|activate) (the|) guest (wifi|network)
    guest (wifi|network) on
    ~we have guests, turn the guest (wifi|network) on
    let visitors use the guest (wifi|network)
    open (the|a) guest network
    """,
    """
    (get|bring) the guest (wifi|network) up
    put guest wifi on
    ~visitors are here, enable guest wifi
    """,
)
_add(
    "set_guest_wifi",
    "en",
    {"state": "on", "duration": "$long.duration", "unit": "$long.unit"},
    """
    (turn|switch) on the guest (wifi|wi-fi|network) for {long}
    (turn|switch) the guest (wifi|wi-fi|network) on for {long}
    (enable|start|activate) (the|) guest (wifi|network) for {long}
    guest (wifi|network) on for {long}
    ~for {long}, (enable|switch on) the guest (wifi|network)
    open the guest network for {long}
    ~I need guest (wifi|network) for {long}
    let guests use the (wifi|network) for {long}
    switch on guest (wifi|network) for {long}
    """,
    """
    turn on guest (wifi|network) for {long}
    (allow|open) guest wifi for {long}
    ~for {long} turn on the guest network
    keep guest wifi on for {long}
    """,
)
_add(
    "set_guest_wifi",
    "en",
    {"state": "off"},
    """
    (turn|switch) off the guest (wifi|wi-fi|network)
    (turn|switch) the guest (wifi|wi-fi|network) off
    (disable|stop|close) (the|) guest (wifi|network)
    guest (wifi|network) off
    ~the guests are gone, turn off the guest (wifi|network)
    shut (down|off) the guest (wifi|network)
    """,
    """
    take the guest (wifi|network) down
    put guest wifi off
    ~the visitors are gone, disable guest wifi
    """,
)
_add(
    "set_guest_wifi",
    "zh",
    {"state": "on"},
    """
    (打开|开启|开)(访客|客人)(网络|wifi|无线)
    把(访客|客人)(网络|wifi|无线)(打开|开启|开开)
    将(访客|客人)无线(打开|开启|开开)
    (访客|客人)(网络|wifi)(打开|开启|开一下)
    ~来客人了,(打开|开)访客(网络|wifi)
    让客人用(访客网络|访客wifi)
    """,
    """
    启用访客(网络|wifi)
    将访客(网络|wifi)打开
    ~有客人,开启访客wifi
    """,
)
_add(
    "set_guest_wifi",
    "zh",
    {"state": "on", "duration": "$long.duration", "unit": "$long.unit"},
    """
    (打开|开启|开)(访客|客人)(网络|wifi|无线){long}
    把(访客|客人)(网络|wifi|无线)(打开|开启|开){long}
    (访客|客人)(网络|wifi)(打开|开启|开){long}
    (访客|客人)(网络|wifi)开{long}后关掉
    给客人开{long}(的|)(网络|wifi)
    开{long}的(访客|客人)(网络|wifi),之后关掉
    {long}内(打开|开启)访客(网络|wifi)
    """,
    """
    启用访客(网络|wifi){long}
    将访客网络开启{long}
    让客人用{long}的访客wifi
    """,
)
_add(
    "set_guest_wifi",
    "zh",
    {"state": "off"},
    """
    (关闭|关掉|关)(访客|客人)(网络|wifi|无线)
    把(访客|客人)(网络|wifi|无线)(关掉|关闭|关了)
    将(访客|客人)无线(关掉|关闭|关了)
    (访客|客人)(网络|wifi)(关掉|关闭|关一下)
    ~客人走了,(关掉|关)访客(网络|wifi)
    停用(访客|客人)(网络|wifi)
    """,
    """
    将访客(网络|wifi)关掉
    ~客人走了,停用访客wifi
    不用访客网络了
    """,
)
for _act, _en, _enh, _zh, _zhh in (
    (
        "block",
        """
    (block|ban) {device} (from the network|from the internet|)
    (block|ban) the device {device}
    (cut off|disconnect) {device} from the (internet|network)
    (don't|do not) let {device} (online|on the network)
    put {device} on the block list
    stop {device} from going online
    kick {device} off the (wifi|network)
    """,
        """
    (ban|block) {device} on the router
    cut the internet for {device}
    keep {device} off the network
    """,
        """
    (禁止|不让|不许){device}上网
    (屏蔽|拉黑|封掉|封锁){device}
    把{device}(拉黑|屏蔽|封掉|踢下线)
    将{device}(拉黑|封掉|踢下线)
    断开{device}的(网络|网)
    (别|不要)让{device}(上网|联网)
    """,
        """
    禁止{device}联网
    将{device}屏蔽
    断了{device}的网
    """,
    ),
    (
        "unblock",
        """
    (unblock|unban) {device}
    (unblock|unban) the device {device}
    let {device} (back online|online again|use the internet again)
    (allow|give) {device} (access to the internet|internet access) again
    take {device} off the block list
    remove the block (for|on|from) {device}
    """,
        """
    let {device} back on the network
    (unban|unblock) {device} on the router
    allow {device} online again
    """,
        """
    (允许|恢复|让){device}(上网|联网)
    (解除|取消)(对|)(屏蔽|封锁){device}
    把{device}(解封|恢复上网|放出来)
    将{device}(恢复上网|放出来)
    (解封|解禁){device}
    {device}可以上网了,解除屏蔽
    """,
        """
    将{device}解封
    解除{device}的屏蔽
    恢复{device}的网络
    """,
    ),
):
    _add("block_device", "en", {"device": "$device", "action": _act}, _en, _enh)
    _add("block_device", "zh", {"device": "$device", "action": _act}, _zh, _zhh)
_add(
    "set_priority",
    "en",
    {"device": "$device", "level": "$prio"},
    """
    (set|change) the (priority|network priority) of {device} to {prio}
    (give|assign) {device} {prio} (network|) priority
    (set|put) {device} (to|on) {prio} priority
    make {device} {prio} priority
    {prio} priority for {device}
    {device} should (have|get) {prio} (bandwidth|network|) priority
    """,
    """
    set {prio} priority for {device}
    adjust the priority of {device} to {prio}
    let {device} have {prio} priority
    """,
)
_add(
    "set_priority",
    "zh",
    {"device": "$device", "level": "$prio"},
    """
    (把|){device}的(网络|)优先级(设为|调到|设成|调成){prio}
    给{device}{prio}优先级
    将{device}(设成|调成){prio}优先级
    (设置|调整){device}(的优先级|网络优先级)为{prio}
    {device}优先级{prio}
    让{device}的网速优先级(变成|变为|设为){prio}
    """,
    """
    将{device}优先级设为{prio}
    {device}的网络优先级要{prio}
    让{device}用{prio}优先级
    """,
)
_add(
    "reboot_router",
    "en",
    {},
    """
    (reboot|restart) the router
    (reboot|restart) (my|our) (router|wifi router)
    turn the router off and on again
    ~the internet is (slow|stuck|down), (reboot|restart) the router
    (do|start) a router (restart|reboot)
    give the router a (restart|reboot)
    power cycle the router
    ~the router (needs|has) to be restarted
    perform a (restart|reboot) of the router
    reboot that router box
    """,
    """
    have the router restarted
    (restart|reboot) the wifi box, the router
    ~the wifi is stuck, do a reboot of the router
    """,
)
_add(
    "reboot_router",
    "zh",
    {},
    """
    (重启|重新启动)(一下|)(路由器|路由)
    把(路由器|路由)(重启|重新启动)(一下|)
    (路由器|路由)重启(一下|)
    ~网(太慢了|断了|卡死了),(重启|重新启动)(一下|)路由器
    给路由器重启
    关掉路由器再打开
    """,
    """
    将路由器重启一下
    ~网卡死了,把路由重启
    让路由器重新启动
    """,
)
_add(
    "run_speed_test",
    "en",
    {},
    """
    (run|start|do) (a|the) (speed test|internet speed test|network speed test)
    (test|check|measure) (my|the|our) (internet|network|wifi) speed
    how fast is (my|the|our) (internet|network|wifi|connection)
    ~(the internet|wifi) feels slow, (test|check) the speed
    see how fast the (internet|network|connection) is
    speed test
    """,
    """
    measure how fast the internet is
    (perform|make) a speed test
    ~I want to check the internet speed
    """,
)
_add(
    "run_speed_test",
    "zh",
    {},
    """
    (测|测试|测一下|测测)(网速|网络速度)
    (做|跑|来)(个|一个|一次)(测速|网速测试)
    (看看|查一下|检查)(现在|)网速(有多快|怎么样|多少)
    网速(有多快|怎么样|是多少)
    ~感觉网(很慢|有点慢),测一下速
    """,
    """
    (运行|开始)网速测试
    ~网有点慢,测测网速
    检查一下网络速度
    """,
)
_add(
    "rename_wifi",
    "en",
    {"name": "$ssid"},
    """
    (rename|name) the (wifi|network) (to|) {ssid}
    (change|set) the (wifi|network) name to {ssid}
    (change|set) the name of the (wifi|network) to {ssid}
    call the (wifi|network) {ssid}
    make {ssid} the (wifi|network) name
    save the (wifi|network) name as {ssid}
    ~the wifi should be (called|named) {ssid}
    """,
    """
    give the wifi the name {ssid}
    ~I want the network to be called {ssid}
    use {ssid} as the wifi name
    """,
)
_add(
    "rename_wifi",
    "zh",
    {"name": "$ssid"},
    """
    (把|)(wifi|无线|网络)(名称|名字|名)(改成|改为|设为|换成){ssid}
    (wifi|无线网络)改名(为|叫|成){ssid}
    (修改|更改)(wifi|无线)名称为{ssid}
    让(wifi|网络)叫{ssid}
    将(无线|网络)名称(改成|改为){ssid}
    (wifi|无线)名字叫{ssid}
    """,
    """
    将wifi的名字换成{ssid}
    给wifi改名叫{ssid}
    用{ssid}做wifi名称
    """,
)

# --- home ---------------------------------------------------------------------------------------

for _state, _en, _enh, _zh, _zhh in (
    (
        "on",
        """
    (turn|switch) on the (light|lights) in the {room}
    (turn|switch) the {room} (light|lights|lamp) on
    (turn|switch) on the {room} (light|lights|lamp)
    {room} (light|lights) on
    (light up|illuminate) the {room}
    ~it is dark in the {room}, lights on
    ~I can't see in the {room}, lights on
    put the {room} (light|lights) on
    """,
        """
    put on the (light|lights) in the {room}
    get the {room} (light|lights) on
    lights on in the {room}
    """,
        """
    (打开|开){room}(的|)灯
    把{room}(的|)(灯|灯光)(打开|开开|点亮)
    将{room}(的|)灯光(打开|开开|点亮)
    ~{room}里看不见,开灯
    {room}(的|)灯(打开|开一下|开开)
    {room}开灯
    ~{room}(太黑了|好黑),(开灯|开一下灯)
    点亮{room}的灯
    """,
        """
    将{room}的灯打开
    开一下{room}(的|)灯
    ~{room}好黑,把灯打开
    """,
    ),
    (
        "off",
        """
    (turn|switch) off the (light|lights) in the {room}
    (turn|switch) the {room} (light|lights|lamp) off
    (turn|switch|shut) off the {room} (light|lights|lamp)
    {room} (light|lights) off
    (kill|cut) the (light|lights) in the {room}
    ~nobody is in the {room}, lights off
    put the {room} (light|lights) out
    """,
        """
    put out the (light|lights) in the {room}
    get the {room} (light|lights) off
    lights off in the {room}
    """,
        """
    (关掉|关闭|关){room}(的|)灯
    把{room}(的|)(灯|灯光)(关掉|关了|熄灭|关上)
    将{room}(的|)灯光(关掉|关了|熄灭)
    {room}(的|)灯(关掉|关一下|关了)
    {room}关灯
    ~{room}没人,(关灯|把灯关了)
    熄灭{room}的灯
    """,
        """
    将{room}的灯关掉
    关一下{room}(的|)灯
    ~{room}没人了,关灯
    """,
    ),
):
    _add("switch_light", "en", {"room": "$room", "state": _state}, _en, _enh)
    _add("switch_light", "zh", {"room": "$room", "state": _state}, _zh, _zhh)
for _state, _en, _enh, _zh, _zhh in (
    (
        "on",
        """
    (turn|switch) on (all the lights|all lights|every light)
    (turn|switch) (all the lights|all lights|every light) on
    all (the|) lights on
    light up the whole house
    """,
        """
    put (all the lights|every light) on
    get all the lights on
    """,
        """
    (打开|开)(所有|全部)(的|)灯
    把(所有|全部)(的|)灯(打开|都打开|开开)
    (所有|全部)的灯都(打开|开开)
    (家里|全屋)的灯(都|全)打开
    """,
        """
    将所有灯打开
    把家里的灯(都|全)打开
    """,
    ),
    (
        "off",
        """
    (turn|switch) off (all the lights|all lights|every light)
    (turn|switch) (all the lights|all lights|every light) off
    all (the|) lights off
    kill (all the lights|every light)
    """,
        """
    put (all the lights|every light) out
    get all the lights off
    """,
        """
    (关掉|关闭|关)(所有|全部)(的|)灯
    把(所有|全部)(的|)灯(关掉|都关掉|关了)
    (所有|全部)的灯都(关掉|关了)
    (家里|全屋)的灯(都|全)关掉
    """,
        """
    将所有灯关掉
    把家里的灯(都|全)关掉
    """,
    ),
):
    _add("switch_light", "en", {"room": "all", "state": _state}, _en, _enh)
    _add("switch_light", "zh", {"room": "all", "state": _state}, _zh, _zhh)
for _change, _en, _enh, _zh, _zhh in (
    (
        "dimmer",
        """
    dim the (light|lights) in the {room}
    dim the {room} (light|lights) (a bit|a little|)
    make the {room} (light|lights) (dimmer|darker|less bright)
    make (it|the light) (dimmer|darker) in the {room}
    (turn|bring) down the (light|lights) in the {room} (a bit|a little|)
    ~the {room} is too bright
    ~it is too bright in the {room}
    lower the {room} (light|lights) (a bit|a little|)
    """,
        """
    make the (light|lights) in the {room} (a bit|a little) (dimmer|darker)
    ~the light in the {room} is too bright
    bring the {room} lights down a little
    """,
        """
    {room}(的|)(灯|灯光)(暗一点|暗一些|调暗|暗点)
    (调暗|调低){room}(的|)(灯|灯光)
    把{room}(的|)灯光(调低|调暗)(一点|一些|点|)
    把{room}(的|)灯(弄暗|变暗)(一点|一些|点|)
    将{room}(的|)灯(弄暗|变暗)(一点|一些|点|)
    让{room}(的|)灯(暗一点|暗一些|变暗)
    ~{room}(太亮了|有点亮|太刺眼)
    ~{room}(的|)灯太亮了,(调低|暗)一点
    把{room}调暗(一点|一些|点)
    """,
        """
    把{room}(的|)灯调暗(一点|一些|点)
    {room}(的|)灯光(弄暗|调低)一点
    ~{room}灯光太亮了
    """,
    ),
    (
        "brighter",
        """
    brighten the (light|lights) in the {room}
    brighten the {room} (light|lights) (a bit|a little|)
    make the {room} (light|lights) (brighter|less dark)
    make (it|the light) brighter in the {room}
    (turn|bring) up the (light|lights) in the {room} (a bit|a little|)
    ~the {room} is too dark
    ~it is too dark in the {room}
    raise the {room} (light|lights) (a bit|a little|)
    """,
        """
    make the (light|lights) in the {room} (a bit|a little) brighter
    ~the light in the {room} is too dark
    bring the {room} lights up a little
    """,
        """
    {room}(的|)(灯|灯光)(亮一点|亮一些|调亮|亮点)
    (调亮|调高){room}(的|)(灯|灯光)
    把{room}(的|)灯光(调高|调亮)(一点|一些|点|)
    把{room}(的|)灯(弄亮|变亮)(一点|一些|点|)
    将{room}(的|)灯(弄亮|变亮)(一点|一些|点|)
    让{room}(的|)灯(亮一点|亮一些|变亮)
    ~{room}(太暗了|有点暗|不够亮)
    ~{room}(的|)灯太暗了,(调高|亮)一点
    把{room}调亮(一点|一些|点)
    """,
        """
    把{room}(的|)灯调亮(一点|一些|点)
    {room}(的|)灯光(弄亮|调高)一点
    ~{room}灯光太暗了
    """,
    ),
):
    _add("adjust_light", "en", {"room": "$room", "change": _change}, _en, _enh)
    _add("adjust_light", "zh", {"room": "$room", "change": _change}, _zh, _zhh)
_add(
    "set_brightness",
    "en",
    {"room": "$room", "percent": "$pct"},
    """
    set the {room} (light|lights|brightness) to {pct}
    set the brightness (in|of) the {room} to {pct}
    {room} (brightness|lights) (to|at) {pct}
    (dim|turn) the {room} lights to {pct}
    make the {room} (light|lights) {pct} bright
    change the {room} light level to {pct}
    """,
    """
    put the {room} lights at {pct}
    adjust the {room} brightness to {pct}
    change the brightness of the {room} to {pct}
    """,
)
_add(
    "set_brightness",
    "zh",
    {"room": "$room", "percent": "$pct"},
    """
    (把|){room}(的|)(灯|灯光)(亮度|)(调到|设为|设到|调成){pct}
    {room}(的|)(灯|灯光|)亮度{pct}
    {room}(亮度|灯光亮度)(调到|开到|设到){pct}
    (设置|调节){room}(的|)亮度(为|到){pct}
    让{room}(的|)灯亮度(变成|变为){pct}
    将{room}(的|)灯光亮度(调到|设到){pct}
    """,
    """
    将{room}(的|)亮度设为{pct}
    把{room}亮度调成{pct}
    {room}灯的亮度要{pct}
    """,
)
_add(
    "set_light_color",
    "en",
    {"room": "$room", "color": "$color"},
    """
    (set|change|turn) the {room} (light|lights) (to|) {color}
    make the {room} (light|lights) {color}
    make the (light|lights) in the {room} {color}
    ~I want {color} (light|lights) in the {room}
    {color} (light|lights) in the {room}
    change the color of the {room} (light|lights) to {color}
    adjust the {room} (light|lights) to {color}
    """,
    """
    give the {room} {color} (light|lights)
    set the color in the {room} to {color}
    switch the {room} lights to {color}
    """,
)
_add(
    "set_light_color",
    "zh",
    {"room": "$room", "color": "$color"},
    """
    (把|){room}(的|)(灯|灯光)(调成|改成|变成|换成){color}
    {room}(的|)(灯|灯光)(用|要|换){color}
    (设置|调整){room}(的|)(灯|灯光)颜色为{color}
    把{room}(的|)灯光颜色(调成|设为|改为){color}
    让{room}(的|)灯变{color}
    将{room}(的|)灯光(变成|改成){color}
    """,
    """
    将{room}的灯换成{color}
    {room}(的|)灯光颜色(要|设成){color}
    ~我要{room}的灯是{color}
    """,
)
for _act, _en, _enh, _zh, _zhh in (
    (
        "open",
        """
    open the (curtain|curtains|blinds) in the {room}
    open the {room} (curtain|curtains|blinds)
    {room} (curtains|blinds) open
    (draw|pull) (open|back) the {room} (curtain|curtains)
    let some light in the {room}, open the curtains
    ~I want the {room} (curtains|blinds) opened
    pull up the {room} blinds
    """,
        """
    have the {room} (curtain|curtains) opened
    pull the curtains in the {room} open
    draw back the curtains in the {room}
    """,
        """
    (打开|拉开|开){room}(的|)窗帘
    把{room}(的|)窗帘(打开|拉开|开开)
    {room}(的|)窗帘(打开|拉开|开一下)
    {room}(开|拉开)窗帘
    将{room}(的|)窗帘(打开|开开)
    """,
        """
    将{room}的窗帘拉开
    开一下{room}(的|)窗帘
    ~{room}要见光,打开窗帘
    """,
    ),
    (
        "close",
        """
    (close|shut) the (curtain|curtains|blinds) in the {room}
    (close|shut) the {room} (curtain|curtains|blinds)
    {room} (curtains|blinds) (closed|shut)
    (draw|pull) (closed|shut) the {room} (curtain|curtains)
    ~too much sun in the {room}, close the curtains
    pull down the {room} blinds
    """,
        """
    have the {room} (curtain|curtains) closed
    pull the curtains in the {room} closed
    shut the blinds of the {room}
    """,
        """
    (关上|拉上|关){room}(的|)窗帘
    把{room}(的|)窗帘(关上|拉上|合上)
    {room}(的|)窗帘(关上|拉上|关一下)
    {room}(关|拉上)窗帘
    将{room}(的|)窗帘(关上|合上)
    ~太阳晒进{room}了,(关|拉上)窗帘
    """,
        """
    将{room}的窗帘拉上
    关一下{room}(的|)窗帘
    ~{room}太晒,拉上窗帘
    """,
    ),
):
    _add("set_curtain", "en", {"room": "$room", "action": _act}, _en, _enh)
    _add("set_curtain", "zh", {"room": "$room", "action": _act}, _zh, _zhh)
_add(
    "set_thermostat",
    "en",
    {"degrees": "$deg"},
    """
    (set|turn|change) the thermostat to {deg} (degrees|)
    (set|change) the (home|house) (temperature|heating) to {deg} (degrees|)
    thermostat (to|at) {deg} (degrees|)
    (heat|cool|warm) the house to {deg} (degrees|)
    make (the house|it) {deg} degrees (at home|in the house|inside)
    ~I want {deg} degrees (at home|in the house)
    keep the (home|thermostat) at {deg} degrees
    adjust the (thermostat|home heating) to {deg} (degrees|)
    """,
    """
    put the thermostat at {deg} degrees
    adjust the house temperature to {deg} (degrees|)
    keep the house at {deg} degrees
    """,
)
_add(
    "set_thermostat",
    "zh",
    {"degrees": "$deg"},
    """
    (把|)(家里|室内|屋里)(的|)(温度|暖气)(调到|设为|设到|调成){deg}度
    (恒温器|温控器)(调到|设为|设到){deg}度
    (家里|屋里|室内)(太冷了|太热了|有点冷|有点热),调到{deg}度
    (设置|调节)(室内|家里)温度(为|到){deg}度
    让(家里|屋里)(保持|升到|降到){deg}度
    """,
    """
    将(室内|家里)温度调成{deg}度
    把(恒温器|温控器)调到{deg}度
    让室内保持{deg}度
    """,
)
for _act, _en, _enh, _zh, _zhh in (
    (
        "start",
        """
    (start|run) the (vacuum|robot vacuum|robot)
    (start|begin) (vacuuming|cleaning)
    (vacuum|clean) the (house|floor|floors)
    let the (robot|vacuum) (clean|run)
    send out the (vacuum|robot)
    turn on the (vacuum|robot vacuum)
    ~the floor is dirty, start the (vacuum|robot)
    """,
        """
    get the (vacuum|robot) going
    have the robot clean the house
    turn the vacuum on
    """,
        """
    (启动|打开|开启)(扫地机|扫地机器人|吸尘器)
    (开始|去)(扫地|打扫|清扫)
    让(扫地机|扫地机器人)(开始|去)(工作|扫地|打扫)
    把(扫地机|扫地机器人)(打开|启动)
    ~地(脏了|很脏),扫一下
    """,
        """
    开一下(扫地机|扫地机器人)
    将扫地机启动
    ~地很脏,让扫地机去打扫
    """,
    ),
    (
        "stop",
        """
    (stop|pause|halt) the (vacuum|robot vacuum|robot)
    (stop|quit) (vacuuming|cleaning)
    turn off the (vacuum|robot vacuum)
    ~the (vacuum|robot) is too loud, stop it
    make the (vacuum|robot) stop
    tell the robot to stop (cleaning|)
    """,
        """
    have the robot stop cleaning
    turn the vacuum off
    halt the cleaning
    """,
        """
    (停止|暂停|关掉)(扫地机|扫地机器人|吸尘器)
    (停止|别|不要)(扫地|打扫|清扫)(了|)
    让(扫地机|扫地机器人)(停下|停止|暂停)
    把(扫地机|扫地机器人)(停掉|关掉|停下)
    ~(扫地机|吸尘器)太吵了,停一下
    """,
        """
    停一下(扫地机|扫地机器人)
    将扫地机停下
    叫扫地机器人停下
    """,
    ),
    (
        "dock",
        """
    (dock|park) the (vacuum|robot vacuum|robot)
    send the (vacuum|robot) (home|back|to its dock|to charge)
    (bring|return) the (vacuum|robot) to (the|its) (dock|charger|base)
    let the (vacuum|robot) go (home|back to its dock|charge)
    charge the (vacuum|robot vacuum)
    """,
        """
    have the robot return to its base
    (get|put) the vacuum back to its dock
    tell the robot to go home
    """,
        """
    让(扫地机|扫地机器人)(回去充电|回充|回家|回充电座)
    (扫地机|扫地机器人)(回去充电|回充|回充电座|回家)
    把(扫地机|扫地机器人)(送回|叫回)(充电座|基座|去充电)
    给(扫地机|扫地机器人)充电
    """,
        """
    叫(扫地机|扫地机器人)(回充|回去充电)
    将扫地机送回充电座
    请扫地机器人回基座
    """,
    ),
):
    _add("control_vacuum", "en", {"action": _act}, _en, _enh)
    _add("control_vacuum", "zh", {"action": _act}, _zh, _zhh)
_add(
    "control_vacuum",
    "en",
    {"action": "start", "room": "$room"},
    """
    (vacuum|clean) the {room}
    (start|run) the (vacuum|robot) in the {room}
    (start|begin) (vacuuming|cleaning) the {room}
    send the (vacuum|robot) to the {room}
    let the (robot|vacuum) clean the {room}
    ~the {room} is dirty, (vacuum|clean) it
    """,
    """
    have the robot vacuum the {room}
    get the vacuum going in the {room}
    ~the {room} floor is dirty, start the robot
    """,
)
_add(
    "control_vacuum",
    "zh",
    {"action": "start", "room": "$room"},
    """
    (打扫|清扫|扫)(一下|){room}
    让(扫地机|扫地机器人)去{room}(扫地|打扫)
    (扫地机|扫地机器人)去{room}
    把{room}(打扫|扫|清扫)(一下|干净)
    将{room}(扫|清扫)干净
    ~{room}(脏了|很脏),(扫|打扫)一下
    """,
    """
    让扫地机打扫{room}
    去{room}扫地
    将{room}打扫一下
    """,
)
for _act, _en, _enh, _zh, _zhh in (
    (
        "lock",
        """
    lock the {door}
    (lock|secure) the {door} (for me|)
    (is|make sure) the {door} (is|) locked
    {door} lock
    put the lock on the {door}
    ~we are leaving, lock the {door}
    ~I am going to bed, lock the {door}
    """,
        """
    have the {door} locked
    get the {door} locked
    ~we are going to bed, secure the {door}
    """,
        """
    (锁上|锁|锁好){door}
    把{door}(锁上|锁好|锁了|反锁)
    将{door}(锁好|锁了|反锁)
    {door}(锁上|锁一下|上锁)
    给{door}上锁
    ~(我们出门了|要睡觉了),(锁上|锁){door}
    """,
        """
    将{door}锁上
    锁一下{door}
    ~要出门了,把{door}锁好
    """,
    ),
    (
        "unlock",
        """
    unlock the {door}
    unlock the {door} (for me|)
    {door} unlock
    take the lock off the {door}
    ~I am (home|back), unlock the {door}
    ~someone is here, unlock the {door}
    make sure the {door} is unlocked
    """,
        """
    have the {door} unlocked
    get the {door} unlocked
    ~I am here, unlock the {door}
    """,
        """
    (解锁|打开){door}(的锁|)
    把{door}(解锁|的锁打开|开锁)
    将{door}(开锁|的锁打开)
    {door}(解锁|开锁)
    给{door}开锁
    ~(我回来了|有人来了),(解锁|打开){door}
    """,
        """
    将{door}解锁
    解锁一下{door}
    ~我到家了,把{door}的锁打开
    """,
    ),
):
    _add("lock_door", "en", {"door": "$door", "action": _act}, _en, _enh)
    _add("lock_door", "zh", {"door": "$door", "action": _act}, _zh, _zhh)

CHAT: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "train": (
            "(tell|sing) me (a joke|a story|a song|something)",
            "what is the (weather|news|score|date) (like|today|)",
            "who (are you|won the game|is the president)",
            "how (old|tall|far) is (the moon|the president|the mountain)",
            "(translate|spell|explain) (this|the word apple|a poem) (for me|)",
            "what do you think (about|of) (music|the weather|dogs)",
            "order (a pizza|some soup|flowers|a taxi) (for me|)",
            "what is (two|seven|nine) (plus|times|minus) (five|three|eight)",
        ),
        "held": (
            "sing a song about (the moon|dogs)",
            "explain the (weather|news) today",
            "order (a taxi|soup) and flowers",
            "who is (the coach|your president)",
        ),
    },
    "zh": {
        "train": (
            "(讲|说|来)(个|一个)(笑话|故事)",
            "(今天|明天|现在)(天气|气温)(怎么样|如何|好吗)",
            "(你是谁|谁赢了比赛|总统是谁)",
            "(月亮|高山|大海)(有多远|有多高|有多深)",
            "(翻译|解释)(一下|)(这句话|这首诗)",
            "你(喜欢|觉得)(音乐|小狗|下雨)(吗|怎么样)",
            "(帮我|)(点|订)(一份|个)(披萨|外卖|鲜花)",
            "(三|五|七)(加|乘|减)(二|四|八)等于(几|多少)",
        ),
        "held": (
            "说个(小狗|月亮)的故事",
            "解释一下今天的天气",
            "订一份(鲜花|披萨)外卖",
            "教练是谁",
        ),
    },
}

SMALL_TALK: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...]] = {
    "en": (
        (
            ("hello", "hi", "hey", "hello (there|MiMo)", "good (morning|evening)"),
            ("hi (there|MiMo)", "hello hello"),
            "Hello! What can I do for you?",
        ),
        (
            ("thanks", "thank you", "thanks a lot", "(great|good|ok), (thanks|thank you)"),
            ("thank you MiMo", "good, thanks a lot"),
            "You are welcome.",
        ),
    ),
    "zh": (
        (
            ("你好", "嗨", "您好", "你好(小米|呀|啊)", "(早上|晚上)好"),
            ("嗨你好", "您好呀"),
            "你好！我能帮你做什么？",
        ),
        (("谢谢", "谢谢你", "多谢", "(好的|太好了),谢谢"), ("多谢你", "太好了,多谢"), "不客气。"),
    ),
}
"""Phrasings (training, held out) and the reply."""


def _add_more() -> None:
    """Extend training lists by those of phrasings_more.txt."""
    text = resources.files(__package__).joinpath("phrasings_more.txt").read_text("utf-8")
    at = {(f.tool, f.lang, json.dumps(f.args)): i for i, f in enumerate(FRAMES)}
    for section in text.split("\n## ")[1:]:
        heading, *lines = section.strip().splitlines()
        tool, lang, args = heading.split(" | ")
        if tool == "chat":
            CHAT[lang]["train"] += tuple(lines)
        else:
            i = at[tool, lang, json.dumps(json.loads(args))]
            FRAMES[i] = replace(FRAMES[i], train=(*FRAMES[i].train, *lines))


_add_more()
