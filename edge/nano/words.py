"""Word lists behind the slot values of the mimo-nano command grammar."""


def _list(text: str, separator: str | None = None) -> list[str]:
    return " ".join(text.split()).split(separator)


FIRST_EN = _list("""
    Anna Ben Carla David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nick Olivia Paul Rosa
    Sam Tina Victor Alice Bob Charlie Diana Eric Fiona George Hannah Ivan Julia Kevin Laura Mark
    Nina Oscar Peter Quinn Rachel Steve Tom Ursula Vera Will Xavier Yara Zoe Adam Bella Chris
    Daisy Ethan Felix Gina Hugo Isla James Kim Linda Martin Nora Owen Penny Ralph Sarah Tony Uma
    Vince Wendy Yusuf Zack Priya Raj Mei Ling Wei Ahmed Fatima Omar Lucas Mateo Sofia Elena Diego
    Lars Ingrid Hans Greta Pierre Claire Luca Giulia Kenji Yuki Mina Jin Hana
""")

SYLLABLES = _list("""
    ba be bi bo bu ca co da de di do du fa fe fi fo ga ge go gu ha he hi ho ja je jo ka ke ki ko
    ku la le li lo lu ma me mi mo mu na ne ni no nu pa pe pi po ra re ri ro ru sa se si so su ta
    te ti to tu va ve vi vo wa we wi ya yo za ze zi zo al an ar as el en er es in ir is on or os
    un ur ash ber chen dor fen gar hol ian jen kin lan mar nor pol qui ros sha tor ven wal xan yan
    zor bri cla dre fra gri kra pla sto tri cha sho the wyn mond ster ton
""")

NOUN_EN = _list("""
    milk bread coffee lunch dinner meeting report ticket garden car bike dog cat baby school
    office train flight hotel doctor dentist gym party cake birthday present book letter box
    package key lamp chair table window river mountain ocean summer winter moon star rain snow
    storm fire heart dream road city village bridge island forest flower rose tiger eagle wolf
    horse rabbit money bank rent invoice contract project budget paper printer coat shoes jacket
    umbrella medicine water tea juice rice soup pizza salad cheese apple banana orange lemon
    tomato potato chicken fish laundry dishes trash kitchen guitar piano violin movie concert game
    match team coach teacher student class exam homework lesson yoga walk run swim trip holiday
    passport visa luggage map camera photo album video song dance story news letter silver golden
    velvet shadow thunder mirror candle harbor sunset sunrise morning midnight diamond crystal
    stone paint brush hammer ladder roof wall floor
""")

VERB_EN = _list("""
    buy call take bring pick check send read write clean wash cook bake order book pay return fix
    find meet visit feed walk water pack print sign finish start review email collect drop move
    change renew cancel plan learn practice watch join invite thank remember paint build sell lend
    borrow carry charge repair update prepare
""")

APPS_EN = _list("""
    WeChat Maps Spotify Camera Calendar Gmail YouTube Notes Weather Settings Photos Clock TikTok
    Browser Contacts Calculator Files Wallet Podcasts Translate Health Netflix Messages Music
    Store Radio Zoom Slack Signal Drive
""")

COMMANDS_EN = _list("""
    alarm timer message call contact music reminder app volume temperature climate window trunk
    seat heating defrost guest wifi block device priority network router reboot speed test name
    switch light lights dim bright brightness color curtain blinds thermostat heat vacuum robot
    lock unlock door song artist label text task percent degrees minutes route tolls level
""")
"""Words by which commands are told apart: as part of a value they must not."""

PLACES_EN = _list("""
    Street Park Airport Hotel Station Mall Hospital Library Cafe Road School Museum Avenue Market
    Stadium Gym
""")

ROOMS_ZH = _list("""
    客厅 厨房 卧室 书房 餐厅 阳台 浴室 卫生间 走廊 玄关 车库 地下室 阁楼 儿童房 客房 主卧 次卧
    洗衣房 储藏室 办公室 花园 健身房 衣帽间 影音室 茶室 门厅 露台 老人房 婴儿房 游戏室
""")

APPS_ZH = _list("""
    微信 地图 相机 日历 浏览器 设置 相册 支付宝 淘宝 抖音 微博 音乐 天气 计算器 备忘录 京东 美团
    滴滴 邮箱 钱包 录音机 翻译 小红书 哔哩哔哩 高德地图 百度 知乎 钉钉 应用商店 文件管理
""")

WORDS_ZH = _list("""
    牛奶 面包 咖啡 午饭 晚饭 会议 报告 车票 花园 自行车 小狗 学校 公司 火车 航班 医生 牙医 蛋糕
    生日 礼物 图书 包裹 钥匙 台灯 椅子 桌子 河流 高山 大海 夏天 冬天 月亮 星星 下雨 下雪 心情 梦想
    道路 城市 村庄 小桥 海岛 森林 玫瑰 老虎 白马 兔子 银行 房租 发票 合同 项目 预算 文件 外套 鞋子
    雨伞 药片 开水 绿茶 果汁 米饭 鸡汤 披萨 沙拉 苹果 香蕉 橙子 柠檬 土豆 鸡蛋 鲜鱼 衣服 盘子 垃圾
    吉他 钢琴 电影 演唱会 比赛 球队 教练 老师 同学 考试 作业 瑜伽 散步 跑步 游泳 旅行 假期 护照
    签证 行李 相机 照片 视频 歌曲 舞蹈 故事 新闻 春风 晚霞 日出 清晨 午夜 钻石 水晶 石头 快递 开会
    到家 出门 吃饭 下班 上班 回家 加班 排队 堵车 带伞 东湖 西山 南门 北京 上海 中心 人民 和平 光明
    幸福 长江 黄河 青年 科技 创新 阳光 花园 文化 时代 未来 世纪 金山 银河 紫竹 玉兰 滨江 翠湖 朝阳
    团结 建设 胜利 解放
""")

PLACES_ZH = _list("""
    路 街 医院 公园 机场 火车站 大厦 酒店 广场 大学 商场 小学 超市 博物馆 停车场 加油站 体育馆
    客运站
""")

ROOMS_EN = [
    room.strip()
    for room in _list(
        """
        kitchen | bedroom | living room | bathroom | study | hallway | garage | attic | basement
        | dining room | guest room | nursery | laundry room | balcony | office | library |
        playroom | porch | cellar | kids room | master bedroom | entrance | terrace | pantry |
        workshop | garden | gym | closet | lounge | stairway
    """,
        "|",
    )
]

SURNAMES_ZH = (
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林罗郑梁谢宋唐许韩冯邓曹彭曾肖田董袁潘于蒋蔡余杜叶程苏"
    "魏吕丁任沈姚卢姜崔钟谭陆汪范金石廖贾夏韦傅方白邹孟熊秦邱江尹薛闫段雷侯龙史陶黎贺顾毛郝龚邵"
    "万钱严覃武戴莫孔向汤"
)

GIVEN_ZH = (
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华玉兰红玲建文国辉力云海山仁波宁贵福生龙元全"
    "胜学祥才发武新利清飞彬富顺信子昌成康星光天达安岩中茂进林有坚和彪博诚先敬震振壮会思群豪心邦"
    "承乐绍功松善厚庆民友裕河哲江浩亮政谦亨奇固之轮翰朗伯宏言若鸣朋斌梁栋维启克伦翔旭鹏泽晨辰士"
    "以家致树炎德行时泰盛雄琛钧冠策腾楠榕风航弘雨桐欣怡佳琪梦婷雪诗涵梓萱可馨语嫣晓彤紫菲依妍"
)

CHARS_ZH = (
    "一不人有我他这个们中来上大国地以时就出会可也你对生能而子那得于着下自之年过发后作里用道行所"
    "然家种事方多经么法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日"
    "军者意无力它长机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文"
    "体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老世位次度门任常先海通教儿原东"
    "声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目"
    "太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则"
    "听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领"
    "共确传师观清今切院识候带导争运笔蓝绿红黄紫黑花草树木林森河湖江雨雪风云星晨夜春夏秋冬梦歌舞"
    "诗酒茶饭菜米鱼肉鸡牛羊狗猫鸟龙虎熊兔蛇鼠猴猪桃梨杏梅兰竹菊松柏石玉珠宝银铜铁火灯烛船车桥街"
    "巷楼塔寺宫城镇村乡园亭店铺厂房屋窗床桌椅碗筷刀叉盘杯瓶壶衣裤鞋帽伞包袋箱盒布线针纸画琴棋弦"
    "鼓笛唱跳跑飞游泳爬坐站睡醒吃喝玩乐笑哭爱恨喜怒哀愁念忆离逢聚散归远近快慢早晚暖冷热凉甜酸苦"
    "辣咸香臭轻软硬干湿深浅厚薄宽窄圆尖亮暗旧忙闲富贫贵贱勇敢温柔善良聪慧诚勤劳朴素端庄沉默静闹"
    "繁华荒孤独幸福健康递药票"
)
"""Characters for invented names and phrases, without those that mark where a value ends."""
