"""Sound classes by file name: label, caption, and the words that say so. First match wins, so narrow words stand
first."""

import hashlib
import re

# label, caption, pattern searched in the words of the file name (lower case, split at separators, digits and CamelCase)
_TABLE = (
    ("footsteps", "footsteps", r"foot ?steps?|\bsteps?\b|\bfs\b|npc walking walk|npc cave walk|mammut walk|icy walk"),
    ("thunder", "thunder rumbling", r"thunder(?! ?stick)|\blightning\b"),
    ("wind", "wind blowing", r"\bwind(?! chimes| mill)\b|wind ?gust|cavewind|wind ?howl"),
    ("rain", "rain falling", r"\brain\b"),
    (
        "splash",
        "something splashing into water",
        r"(?<!drum )splash(?! (hard|med|soft))|water impact|water ?drop|\bplunge\b",
    ),
    ("ocean", "ocean waves", r"ocean waves?|oceanwaves|sea ?shore|\bwaves\b"),
    (
        "water",
        "water flowing",
        r"\bwater(?!melon|color)\w*|\briver\b|droplets?|drips?\b|bubbles?|\bpldik\b|bubles|geyser|ripples"
        r"|parkland lake",
    ),
    ("fireworks", "fireworks exploding", r"fireworks?|firecracker"),
    (
        "explosion",
        "an explosion",
        r"explo\w*|(?<!bd )\bboom\b|soft boom|\bexp\b|dynamite exp|bomb exp|meteor|empexplode",
    ),
    (
        "gunshot",
        "a gunshot",
        r"\bguns?\d?\b|gunshot|shotgun|pistol|rifle|musket|machine ?gun|minigun|gunfire|\bm16\b|sniper",
    ),
    (
        "fire",
        "a fire crackling",
        r"\bfire(?!station|works|ball|wall|arrow|truck|flower|punch| ?extinguish| station| arrow| truck| flower)\b"
        r"(?! flint)|flames?\b|campfire|burn(ing)?\b|furnace|embers|torch\b",
    ),
    ("door", "a door opening or closing", r"\bdoors?\b|fencegate|door ?slam|\bgate\b"),
    ("glass", "glass breaking or clinking", r"glass(?! hum| rub)|shatter|\bbottle\b"),
    ("hammer", "hammering", r"hammer(?!head)\w*|anvil|blacksmith|\bsmith\b|gavel|jack ?hammer|\bnails?\b"),
    ("saw", "sawing wood", r"\bsaw(ing|mill)?\b|buzz ?saw|bench ?saw|chain ?saw|handsaw"),
    ("axe", "an axe chopping wood", r"\baxe?\b|wood ?cutting|chopp|tree cutting|hatchet|harvest wood"),
    (
        "mining",
        "digging with a pickaxe",
        r"pick ?axe|\bmine\b(?! beep)|dig(ging)?\b|\bdug\b|stone ?cutter|stone ?mason|geologist|cracky",
    ),
    ("helicopter", "a helicopter flying", r"helicopter|apache"),
    (
        "airplane",
        "an airplane flying",
        r"air ?plane|\bplanes?\b|\bjet\b(?!pack)|aircraft|cessna|\bf \b|fly ?by\b|planelow|biplane",
    ),
    ("train", "a train passing", r"\btrains?\b|\brail train|steam (train|engine)|locomotive"),
    ("siren", "an emergency siren", r"siren|police ?car|fire ?truck|ambulance|air raid"),
    ("car_horn", "a horn honking", r"honk|car ?horn|boat ?horn|seaport"),
    ("skid", "tyres skidding", r"\bskid\b"),
    ("car_passing", "a vehicle passing by", r"passing|trafic|traffic|\btruck\b|\bbus\b|\bcar\b(?! eng)"),
    ("engine", "a car engine running", r"engine|motor(?!cycle p)|\bdiesel\b|\bignition\b|tractor|bulldozer|\btank\b"),
    ("dog", "a dog barking", r"\bdogs?\b|bark\w*|puppy|collie|\bpes\b"),
    ("cat", "a cat meowing", r"\bcats?\b|meow|kitten"),
    ("cow", "a cow mooing", r"\bcows?\b|\bmoo\b|\box\b|\bbull\b(?! dozer)"),
    ("sheep", "a sheep bleating", r"sheep|\blamb\b|\bbaa\b|\bram\b"),
    ("goat", "a goat bleating", r"\bgoat"),
    ("pig", "a pig grunting", r"\bpigs?\b|\bboar\b"),
    ("horse", "a horse neighing or galloping", r"\bhorses?\b|\bgallop|canter|\bpony\b|ihaha"),
    ("donkey", "a donkey braying", r"donkey|\bmule\b"),
    ("duck", "a duck quacking", r"\bducks?\b|rubberduck|quack"),
    ("goose", "a goose honking", r"\bgoose\b|geese"),
    ("rooster", "a rooster crowing", r"rooster|\bcock\b"),
    ("hen", "hens clucking", r"chickens?\b|\bhens?\b"),
    ("owl", "an owl hooting", r"\bowl\b"),
    ("crow", "a crow cawing", r"\bcrow\b|raven"),
    ("seagull", "seagulls calling", r"\bsea ?gulls?\b|\bgulls?\b"),
    ("hawk", "a bird of prey calling", r"\bhawk\b|\beagle\b|falcon"),
    ("cuckoo", "a cuckoo calling", r"cuckoo"),
    (
        "songbird",
        "birds singing",
        r"\bbirds?\b|chirp|twitter|nightingale|canary|sparrow|stebet|parrot|\brobin\b|blackbird",
    ),
    ("wolf", "a wolf or coyote howling", r"wolf|coyote|howl"),
    ("lion", "a lion or tiger roaring", r"\blion\b|tiger|\broar\b|leopard"),
    ("elephant", "an elephant trumpeting", r"elephant|\bele\b"),
    ("frog", "frogs croaking", r"frogs?\b|\btoad\b"),
    ("crickets", "crickets chirping", r"crickets?\b|grasshopper|cicada"),
    ("bee", "a bee or mosquito buzzing", r"\bbees?\b|mosquito|\bwasp\b|bumblebee|^fly$"),
    ("whale", "whales or dolphins calling", r"whale|dolphin|orca"),
    ("monkey", "a monkey or ape calling", r"monkey|chimp|gorilla|orangutan|\bape\b"),
    ("typing", "keyboard typing", r"typing|type ?writer(?! ?bell)|keyclick|\bkey$"),
    ("camera", "a camera shutter clicking", r"camera(?! focus)|shutter"),
    ("telephone", "a telephone ringing", r"\bphone\b(?! outgoing)|telephone"),
    (
        "clock",
        "a clock ticking",
        r"\bclock\b|\btick(ing)?\b|tik ?tak|\btik\b|\btock\b|metronome|cuckoo ?clock|tower ?clock|budik|alarm clock",
    ),
    (
        "bell",
        "a bell ringing",
        r"(?<!cow)\bbells?\b|bell ?toll|towerbell|typewriterbell|savebell|wind chimes|\bgong\b|dong\b",
    ),
    ("applause", "people applauding", r"applau\w*|cheer\w*"),
    ("clap", "a hand clap", r"hand ?clap|\bclap\b"),
    ("crowd", "a crowd of people", r"crow?u?d\b|party noise|\bmarket\b|tavern|\binn\b|\bschool\b"),
    ("laugh", "a person laughing", r"\blaugh|giggle"),
    ("scream", "a person screaming", r"scream"),
    ("cough", "a person coughing", r"cough"),
    ("sneeze", "a person sneezing", r"sneeze"),
    ("baby", "a baby crying", r"baby ?cry|\bbaby\b"),
    ("snore", "a person snoring or gulping", r"snore|gulp|slurp"),
    ("heartbeat", "a heart beating", r"heart ?beat|heart beat"),
    ("vacuum", "a vacuum cleaner", r"vacuum"),
    ("washing", "a washing machine", r"washing|pracka"),
    ("kettle", "a kettle whistling", r"kettle"),
    ("toilet", "a toilet flushing", r"toilet"),
    ("sewing", "a sewing machine", r"sewing"),
    ("factory", "factory machinery", r"factory|industr|\bmachine\b|machinery|\bmill\b|weaving|weaver|conveyor"),
    ("whistle", "a whistle", r"whistle"),
    ("coins", "coins clinking", r"\bcoins?\b|\bgold\b|\bcash\b|money"),
    ("sword", "swords clashing", r"swords?\b|knife|dagger|saber"),
    ("bow", "an arrow being shot", r"\bbow\b|crossbow|arrow"),
    ("kick_drum", "a kick drum", r"\bkick\b|\bbd\b|bassdrum|bass drum|\bkik\b"),
    ("snare", "a snare drum", r"snare|\bsn\b"),
    ("hihat", "a hi-hat", r"hi ?hat|\bhat (open|closed|semi|pedal)|\bhh\b"),
    (
        "cymbal",
        "a cymbal crash",
        r"cymbal|\bcrash (hard|med|soft)|\bride\b|ride (hard|med|soft)|drum splash|splash (hard|med|soft)|\bcr\b",
    ),
    ("tom", "a tom drum", r"\btoms?\b|\btm\b|tomfloor|tommid|timpani"),
    ("tabla", "hand percussion", r"tabla|tambourine|bongo|conga|shaker|maracas|castanets|\bclave\b"),
    ("piano", "a piano playing", r"piano|harpsichord|klavir"),
    ("guitar", "a guitar playing", r"guit(ar)?\w*|banjo|mandoline?|mand ?pluk"),
    ("violin", "a violin or cello playing", r"violins?|cello|viola|\bvla\b|bratsche"),
    ("harp", "a harp playing", r"\bharp\b"),
    ("flute", "a flute or recorder playing", r"flute|recorder|clarinet|oboe|piccolo"),
    ("trumpet", "a trumpet or horn playing", r"trumpet|\bhorn\b|trombone|tuba\b|saxophone|brass|fanfare"),
    ("xylophone", "a xylophone playing", r"xylo\w*|marimba?\w*|marmstk"),
    ("organ_accordion", "an accordion or organ", r"organ\b|accordion|harmonica"),
    ("singing", "a person singing", r"singer|choir|singing"),
    ("crash", "something crashing", r"crash"),
    ("beep", "an electronic beep", r"beeps?\b|bleep|blip"),
    ("click", "a mouse or button click", r"click|\bclic\b|\bbutton\b"),
    ("pop", "a pop", r"\bpop\b"),
    ("hum", "electrical hum", r"power ?hum|substation|power ?line|\bhum\b|glass hum|nuclear ?loop"),
    ("geiger", "a Geiger counter", r"radiation"),
)
_FALSE_HITS = re.compile(
    r"cowbell|horseman|stickfighter|\back\b|thunderstick|dragonstick|magic|spell|rubberband|tree howling|swipe"
    r"|bird bath|fire ?ball|crossing|xing|window"
    r"|(crylink|electro|grenade|hagar|hook|hookbomb|rocket|strength|uzi|melee|crossbow) fire"
    r"|bow puny|laser|plasma|reload|^brass$|security camera|camera lens|magnifying|musical glasses|valkyries|rocking"
    r"|sea ?lion|yeti|drums with|hog impact|paper|hyperspace|influencer|alert|with horse"
)
_RULES = tuple((label, caption, re.compile(pattern)) for label, caption, pattern in _TABLE)
CAPTIONS = {label: caption for label, caption, _ in _TABLE}
"""Label to caption, for every known sound class."""

TABLE_DIGEST = hashlib.sha256(repr((_TABLE, _FALSE_HITS.pattern)).encode()).hexdigest()
"""Changes when the table does."""

# fmt: off
INSTRUMENTS = frozenset((
    "kick_drum", "snare", "hihat", "cymbal", "tom", "tabla", "piano", "guitar", "violin", "harp", "flute", "trumpet",
    "xylophone", "organ_accordion", "singing",
))
# fmt: on
_HUMAN = frozenset(("laugh", "scream", "cough", "sneeze", "baby", "snore", "applause"))


def words(path: str) -> str:
    """The file name of ``path`` as lower-case words: ``"sounds/WolfHowl_02.ogg"`` -> ``"wolf howl"``."""
    stem = path.rpartition("/")[2].partition(".")[0]
    stem = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem)
    return " ".join(re.sub(r"[^a-z]+", " ", stem.lower()).split())


def find_label(path: str) -> str | None:
    """The sound class that the file name says, or ``None``."""
    name = words(path)
    if _FALSE_HITS.search(name):
        return None
    return next((label for label, _, pattern in _RULES if pattern.search(name)), None)


def is_ambience(label: str | None, seconds: float) -> bool:
    """Whether a sound serves as background noise: long enough, and neither an instrument nor a single human sound."""
    return seconds >= 4.0 and label not in INSTRUMENTS and label not in _HUMAN
