"""What time it is in a city, for the `current_time` tool: from the IANA time zones, with no network.

A city is found by the last part of a zone's name (Paris: Europe/Paris) or in a table of large cities without a zone.

    >>> local_time("tokyo", at=datetime(2026, 11, 22, 12, 30, tzinfo=UTC))
    '2026-11-22 21:30 Sunday, Asia/Tokyo'
"""

import functools
import re
import unicodedata
import zoneinfo
from datetime import UTC, datetime

from glm4lite.base.errors import ToolError

# Not strftime("%A"), which speaks the language of the machine.
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_CITIES_OF_ZONES = {
    "Asia/Shanghai": "beijing peking shenzhen guangzhou tianjin chengdu wuhan hangzhou nanjing xian suzhou qingdao"
    " 北京 上海 深圳 广州 天津 成都 武汉 杭州 南京 西安 苏州 中国 china",
    "Asia/Chongqing": "重庆",
    "Asia/Hong_Kong": "hongkong 香港",
    "Asia/Taipei": "台北",
    "Asia/Macau": "澳门",
    "Asia/Tokyo": "osaka kyoto yokohama nagoya sapporo 东京 大阪 京都 日本 japan",
    "Asia/Seoul": "busan 首尔",
    "Asia/Singapore": "新加坡",
    "Asia/Kolkata": "mumbai bombay delhi new_delhi bangalore bengaluru chennai hyderabad calcutta pune india",
    "Asia/Karachi": "islamabad lahore",
    "Asia/Ho_Chi_Minh": "hanoi saigon",
    "Asia/Dubai": "abu_dhabi",
    "Asia/Riyadh": "jeddah mecca",
    "Asia/Jerusalem": "tel_aviv",
    "America/New_York": "washington washington_dc boston miami philadelphia atlanta nyc new_york_city 纽约 华盛顿",
    "America/Chicago": "houston dallas austin san_antonio new_orleans minneapolis",
    "America/Denver": "salt_lake_city",
    "America/Los_Angeles": "san_francisco seattle las_vegas san_diego san_jose portland la 洛杉矶 旧金山",
    "America/Toronto": "ottawa montreal quebec",
    "America/Edmonton": "calgary",
    "America/Sao_Paulo": "rio_de_janeiro rio brasilia",
    "America/Mexico_City": "mexico",
    "Europe/London": "edinburgh manchester birmingham liverpool glasgow 伦敦",
    "Europe/Paris": "lyon marseille nice toulouse 巴黎",
    "Europe/Berlin": "munich hamburg frankfurt cologne munchen koln stuttgart dusseldorf 柏林",
    "Europe/Rome": "milan naples turin florence venice 罗马",
    "Europe/Madrid": "barcelona seville valencia 马德里",
    "Europe/Zurich": "geneva basel bern",
    "Europe/Amsterdam": "rotterdam the_hague",
    "Europe/Kyiv": "kiev",
    "Europe/Moscow": "saint_petersburg st_petersburg 莫斯科",
    "Europe/Istanbul": "ankara 伊斯坦布尔",
    "Africa/Johannesburg": "cape_town pretoria durban",
    "Africa/Cairo": "alexandria 开罗",
    "Africa/Casablanca": "marrakesh rabat",
    "Australia/Sydney": "canberra 悉尼",
    "Australia/Brisbane": "gold_coast",
    "Pacific/Auckland": "wellington",
    "Pacific/Honolulu": "hawaii",
}


def local_time(city: str, at: datetime | None = None) -> str:
    """Date, time and weekday in `city` (a city or an IANA zone), at the aware moment `at` or now; raises ToolError."""
    zone = find_zone(city)
    moment = (at or datetime.now(UTC)).astimezone(zoneinfo.ZoneInfo(zone))
    return f"{moment:%Y-%m-%d %H:%M} {_WEEKDAYS[moment.weekday()]}, {zone}"


def find_zone(city: str) -> str:
    """The IANA zone of a city's or zone's name, case and accents ignored; raises ToolError when there is none."""
    zones = _zones()
    for name in (city, city.split(",")[0], re.sub(r"(?i)\bcity$", "", city.strip())):
        zone = zones.get(_key(name))
        if zone is not None:
            return zone
    raise ToolError(f"no time zone is known for {city[:60]!r}; try a large city nearby or a name like Europe/Paris")


def _key(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name.casefold())
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    return re.sub(r"[\s_\-.,'’]+", "_", plain.strip()).strip("_")


@functools.cache
def _zones() -> dict[str, str]:
    """Key of every zone, of every zone's last part and of the cities above, to the zone's name."""
    names = sorted(zoneinfo.available_timezones())
    if not names:
        raise ToolError("this machine has no time zone data: pip install tzdata")
    found: dict[str, str] = {}
    for name in names:
        region, _, last = name.rpartition("/")
        # The first of two equal last parts is kept; "US/Eastern" and "Etc/GMT+5" are not cities.
        if region and region.split("/")[0] not in ("Etc", "US", "SystemV", "Canada", "Brazil", "Chile", "Mexico"):
            found.setdefault(_key(last), name)
    found |= {_key(name): name for name in names}
    for zone, cities in _CITIES_OF_ZONES.items():
        if zone in names:
            found |= dict.fromkeys(cities.split(), zone)
    return found
