"""What EmojiKB keeps and what it calls things: the part of the data set that is judgement, not computation.

Every concept is named by its label in emojibase. `label = name` gives it the name a person would say; a leading `~`
says that the name takes no article in a sentence ("What kind of thing are jeans" reads wrong with "a jeans").
Whatever is not listed here is left out: skin tones and gendered variants, clock faces, arrows, keycaps, buttons,
letters, geometric shapes, and drawings whose official name nobody would guess or on which the four sets disagree.
"""

from __future__ import annotations


def _table(text: str) -> dict[str, str | None]:
    """Read `AR Spanish; BE -`: a country code and its value, `-` for "do not ask"."""
    pairs = (entry.split(None, 1) for entry in text.split(";"))
    return {
        code: None if value.strip() == "-" else " ".join(value.split())
        for code, value in pairs
    }


# (kind, category): labels. Kinds are singular, categories plural or collective.
KINDS: dict[tuple[str, str], str] = {
    ("mammal", "animals"): """
        monkey; gorilla; orangutan; dog; poodle; wolf; fox; raccoon; cat; black cat; lion; tiger face = tiger;
        leopard; moose; donkey; horse; zebra; deer; bison; water buffalo; cow; pig; boar = wild boar; ram; ewe
        = sheep; goat; camel; two-hump camel; llama; giraffe; elephant; mammoth; rhinoceros; hippopotamus;
        mouse face = mouse; rat; hamster; rabbit; chipmunk; beaver; hedgehog; bat; bear; polar bear; koala;
        panda; sloth; otter; skunk; kangaroo; badger; see-no-evil monkey; hear-no-evil monkey; speak-no-evil
        monkey""",
    ("bird", "animals"): """
        turkey; chicken; rooster; hatching chick; baby chick = chick; bird; penguin; dove; eagle; duck; swan;
        owl; dodo; flamingo; peacock; parrot; goose""",
    (
        "reptile",
        "animals",
    ): "crocodile; turtle; lizard; snake; sauropod = long-necked dinosaur; T-Rex",
    ("amphibian", "animals"): "frog",
    ("sea animal", "animals"): """
        spouting whale = whale; dolphin; seal; fish; tropical fish; blowfish = pufferfish; shark; octopus;
        jellyfish; crab; lobster; shrimp; squid; oyster; coral = ~coral""",
    ("bug", "animals"): """
        snail; butterfly; bug = caterpillar; ant; honeybee = bee; beetle; lady beetle = ladybug; cricket;
        cockroach; spider; scorpion; mosquito; fly; worm""",
    ("flower", "plants"): """
        bouquet = bouquet of flowers; cherry blossom; white flower; lotus; rose; wilted flower; hibiscus;
        sunflower; tulip; hyacinth""",
    ("tree or plant", "plants"): """
        seedling; potted plant; evergreen tree; deciduous tree; palm tree; cactus; sheaf of rice; herb;
        shamrock; four leaf clover = four-leaf clover; maple leaf; fallen leaf""",
    ("vegetable", "food and drink"): """
        mushroom; avocado; eggplant; potato; carrot; ear of corn; hot pepper = chili pepper; bell pepper;
        cucumber; leafy green = ~lettuce; broccoli = ~broccoli; garlic = ~garlic; onion; peanuts = ~peanuts;
        beans = ~beans; chestnut; ginger root = ~ginger; pea pod; roasted sweet potato = sweet potato""",
    ("fruit", "food and drink"): """
        grapes = ~grapes; melon; watermelon; tangerine; lemon; banana; pineapple; mango; red apple; green
        apple; pear; peach; cherries = ~cherries; strawberry; blueberries = ~blueberries; kiwi fruit; tomato;
        olive; coconut""",
    ("baked food", "food and drink"): """
        bread = loaf of bread; croissant; baguette bread = baguette; flatbread = ~flatbread; pretzel; bagel;
        pancakes = ~pancakes; waffle""",
    ("ingredient", "food and drink"): """
        cheese wedge = ~cheese; meat on bone = ~meat on the bone; poultry leg = chicken leg; cut of meat =
        steak; bacon = ~bacon; egg; butter = ~butter; salt = ~salt; honey pot = pot of honey; canned food =
        ~canned food""",
    ("dish", "food and drink"): """
        hamburger; french fries = ~french fries; pizza; hot dog; sandwich; taco; burrito; tamale; stuffed
        flatbread = stuffed pita; falafel; cooking = fried egg; shallow pan of food = paella; fondue; green
        salad = salad; popcorn = ~popcorn; bento box; rice cracker; rice ball; cooked rice = bowl of rice;
        curry rice = ~curry and rice; steaming bowl = bowl of noodles; spaghetti = ~spaghetti; oden = ~oden;
        sushi = ~sushi; fried shrimp; fish cake with swirl = fish cake; dumpling; takeout box""",
    ("sweet", "food and drink"): """
        moon cake = mooncake; dango = ~dango; fortune cookie; soft ice cream = ice cream cone; shaved ice =
        ~shaved ice; ice cream = bowl of ice cream; doughnut; cookie; birthday cake; shortcake = slice of
        cake; cupcake; pie; chocolate bar; candy = ~candy; lollipop; custard = ~custard""",
    ("drink", "food and drink"): """
        glass of milk; hot beverage = cup of coffee; teacup without handle = cup of tea; sake = bottle of
        sake; bottle with popping cork = bottle of champagne; wine glass = glass of wine; cocktail glass =
        cocktail; tropical drink; beer mug = mug of beer; clinking beer mugs = ~clinking beer mugs; clinking
        glasses = ~clinking glasses; tumbler glass = glass of whisky; cup with straw = soft drink; bubble tea
        = ~bubble tea; beverage box = juice box; mate = cup of mate""",
    ("kitchen item", "objects"): """
        baby bottle; teapot; chopsticks = ~chopsticks; fork and knife with plate = plate with a fork and
        knife; fork and knife; spoon; kitchen knife; jar; amphora; ice = ice cube""",
    ("landscape", "places"): """
        water wave = wave; snow-capped mountain; mountain; volcano; camping = campsite; beach with umbrella =
        beach; desert; desert island; national park; cityscape; sunrise; sunset = sunset over buildings;
        bridge at night; hot springs = hot spring""",
    ("sky object", "sky and weather"): """
        milky way = ~the Milky Way; new moon; first quarter moon = half moon; full moon; crescent moon; sun =
        ~the sun; sun with face = smiling sun; ringed planet; star; glowing star; shooting star; comet""",
    ("building", "places"): """
        stadium; classical building = classical temple; building construction = construction site; hut; houses
        = ~houses; derelict house; house; office building; post office; hospital; bank; hotel; love hotel;
        convenience store; school; factory; Japanese castle; castle; wedding = wedding chapel""",
    ("place of worship", "places"): """
        church; mosque; hindu temple = Hindu temple; synagogue; shinto shrine = Shinto shrine; kaaba = ~the
        Kaaba""",
    ("landmark", "places"): """
        mount fuji = ~Mount Fuji; Tokyo tower = ~Tokyo Tower; Statue of Liberty = ~the Statue of Liberty; moai
        = Easter Island statue; fountain""",
    ("fairground ride", "places"): """
        carousel horse; playground slide; ferris wheel = Ferris wheel; roller coaster; circus tent""",
    ("map", "objects"): "globe showing Europe-Africa = globe; world map; map of Japan",
    ("scientific instrument", "objects"): """
        compass; thermometer; alembic; test tube; petri dish = Petri dish; microscope; telescope; magnifying
        glass tilted left = magnifying glass""",
    ("building material", "objects"): "brick; rock; wood = ~wood",
    (
        "furniture",
        "objects",
    ): "window; door; mirror; bed; couch and lamp; chair; toilet; shower; bathtub",
    ("tool", "objects"): """
        ladder; hammer; axe; pick = pickaxe; carpentry saw = saw; wrench; screwdriver; nut and bolt; gear =
        gear wheel; clamp; balance scale = ~scales; chains = ~chains; hook; toolbox; magnet; mouse trap;
        bucket; broom; plunger; fire extinguisher""",
    ("train", "transport"): """
        locomotive = steam locomotive; bullet train; train; metro = metro train; monorail; tram car = tram;
        suspension railway""",
    ("land vehicle", "transport"): """
        bus; trolleybus; minibus; ambulance; fire engine; police car; taxi; automobile = car; sport utility
        vehicle = SUV; pickup truck; delivery truck; articulated lorry; tractor; racing car; motorcycle; motor
        scooter; auto rickshaw; bicycle; kick scooter; skateboard; manual wheelchair; motorized wheelchair =
        electric wheelchair""",
    (
        "boat",
        "transport",
    ): "sailboat; canoe; speedboat; ferry; motor boat = motorboat; ship",
    ("flying machine", "transport"): """
        airplane; small airplane; airplane departure = plane taking off; airplane arrival = plane landing;
        parachute; helicopter; satellite; rocket; flying saucer""",
    ("traffic feature", "transport"): """
        bus stop; motorway; railway track; fuel pump; police car light = emergency light; vertical traffic
        light = traffic light; stop sign; construction = roadworks barrier""",
    ("boating item", "transport"): "anchor; ring buoy = lifebuoy",
    ("clock", "objects"): """
        hourglass done = hourglass; watch = wristwatch; alarm clock; stopwatch; timer clock = kitchen timer;
        mantelpiece clock""",
    ("weather", "sky and weather"): """
        cloud; sun behind cloud = sun behind a cloud; cloud with lightning and rain = thunderstorm; sun behind
        rain cloud = sun behind a rain cloud; cloud with rain = rain cloud; cloud with snow = snow cloud;
        tornado; cyclone; rainbow; high voltage = lightning bolt; snowflake; snowman without snow = snowman""",
    ("celebration item", "leisure"): """
        jack-o-lantern = carved pumpkin; Christmas tree; fireworks = ~fireworks; firecracker; balloon; party
        popper; confetti ball; tanabata tree = wish tree; pine decoration; Japanese dolls = ~Japanese dolls;
        carp streamer; wind chime; red envelope; ribbon; wrapped gift = gift; reminder ribbon = awareness
        ribbon; ticket; mirror ball = disco ball""",
    ("comic symbol", "symbols"): """
        sparkles = ~sparkles; kiss mark; hundred points = ~hundred points; collision = explosion; dizzy =
        dizzy star; sweat droplets = ~sweat drops; dashing away = puff of air; hole; speech balloon; thought
        balloon; ZZZ = sleep symbol; pile of poo""",
    ("award", "leisure"): """
        military medal; trophy; 1st place medal = gold medal; 2nd place medal = silver medal; 3rd place medal
        = bronze medal""",
    ("sports equipment", "leisure"): """
        soccer ball; baseball; softball; basketball; volleyball; american football = American football; rugby
        football = rugby ball; tennis = tennis ball; flying disc = frisbee; bowling = bowling ball and pins;
        cricket game = cricket bat and ball; field hockey = field hockey stick; ice hockey = ice hockey stick;
        lacrosse = lacrosse stick; ping pong = table tennis bat; badminton = badminton racket; boxing glove;
        martial arts uniform; goal net; flag in hole = golf hole; ice skate; fishing pole; diving mask; skis =
        ~skis; sled; curling stone; roller skate""",
    ("toy or game", "leisure"): """
        bullseye = dartboard; yo-yo; kite; water pistol; pool 8 ball = billiard ball; crystal ball; magic
        wand; video game = game controller; joystick; slot machine; game die; puzzle piece; teddy bear; piñata
        = pinata; nesting dolls = ~nesting dolls; spade suit; diamond suit; club suit; chess pawn; joker;
        mahjong red dragon = mahjong tile""",
    ("art or craft item", "leisure"): """
        performing arts = ~theatre masks; framed picture; artist palette = paint palette; thread = spool of
        thread; sewing needle; yarn = ball of yarn; knot; paintbrush; crayon; clapper board; film frames =
        film strip""",
    ("musical instrument", "leisure"): """
        saxophone; trumpet; accordion; guitar; musical keyboard = piano; violin; banjo; drum; long drum;
        maracas = ~maracas; flute; postal horn""",
    ("garment", "clothing"): """
        lab coat; safety vest; necktie; t-shirt = T-shirt; jeans = ~jeans; scarf; gloves = ~gloves; coat;
        socks = ~socks; dress; kimono; sari; one-piece swimsuit = swimsuit; briefs = ~briefs; shorts =
        ~shorts; bikini; woman’s clothes = blouse; running shirt""",
    ("shoe", "clothing"): """
        thong sandal = flip-flop; man’s shoe = men's shoe; running shoe; hiking boot; flat shoe; high-heeled
        shoe; woman’s sandal = sandal; ballet shoes = ~ballet shoes; woman’s boot = women's boot""",
    ("hat", "clothing"): """
        crown; woman’s hat = sun hat; top hat; graduation cap; billed cap = baseball cap; military helmet;
        rescue worker’s helmet = rescue helmet""",
    ("accessory", "clothing"): """
        glasses = ~glasses; sunglasses = ~sunglasses; goggles = ~goggles; folding hand fan = hand fan; hair
        pick = comb; prayer beads = ~prayer beads; lipstick; ring; gem stone = gemstone; closed umbrella;
        umbrella; nazar amulet""",
    ("bag", "clothing"): """
        purse; handbag; clutch bag; shopping bags = ~shopping bags; backpack; luggage = suitcase; briefcase""",
    ("electronic device", "objects"): """
        studio microphone; microphone; headphone = ~headphones; radio; mobile phone; telephone; telephone
        receiver; pager; fax machine; battery; electric plug; laptop; desktop computer; printer; keyboard;
        computer mouse; television; camera; video camera; movie camera; film projector; speaker high volume =
        speaker; satellite antenna = satellite dish; megaphone""",
    ("disc or tape", "objects"): """
        computer disk = minidisc; floppy disk; optical disk = CD; dvd = DVD; videocassette = video cassette""",
    (
        "light source",
        "objects",
    ): "candle; light bulb; flashlight; red paper lantern; diya lamp = oil lamp; fire",
    ("book", "objects"): """
        closed book = red book; open book; green book; blue book; orange book; books = stack of books;
        notebook""",
    ("paper item", "objects"): """
        scroll; page facing up = sheet of paper; newspaper; rolled-up newspaper; bookmark; label = price tag;
        receipt; memo = note with a pencil; calendar; spiral notepad; clipboard""",
    ("money item", "objects"): """
        coin; money bag; yen banknote; dollar banknote; euro banknote; pound banknote; money with wings =
        ~money with wings; credit card""",
    ("office item", "objects"): """
        abacus; pencil; black nib = pen nib; fountain pen; pen; file folder = folder; chart increasing =
        rising chart; chart decreasing = falling chart; bar chart; pushpin; round pushpin; paperclip; linked
        paperclips = ~linked paperclips; straight ruler; triangular ruler; scissors = ~scissors; card file box
        = box of file cards; file cabinet; wastebasket; identification card = identity card""",
    ("mail item", "objects"): """
        envelope; e-mail = email; love letter; inbox tray; package = parcel; closed mailbox with raised flag =
        closed mailbox; open mailbox with raised flag = open mailbox; postbox; ballot box with ballot = ballot
        box""",
    ("household item", "objects"): """
        locked = lock; key; old key; bellhop bell = desk bell; razor; lotion bottle = bottle of lotion; safety
        pin; basket; roll of paper = ~toilet paper; soap = ~soap; bubbles = ~bubbles; toothbrush; sponge;
        shopping cart; bell""",
    (
        "weapon",
        "objects",
    ): "dagger; crossed swords = ~crossed swords; bomb; boomerang; bow and arrow; shield",
    ("medical item", "objects"): """
        syringe; drop of blood; pill; adhesive bandage = sticking plaster; crutch; stethoscope; x-ray = X-ray;
        dna = ~DNA; white cane""",
    ("person", "people"): """
        baby; boy; girl; man; woman; old man; old woman; person: beard = bearded person; man: bald = bald man;
        pregnant woman; person wearing turban = person with a turban; person in tuxedo = person in a tuxedo;
        person with veil = bride; people holding hands = ~people holding hands; kiss = kissing couple; person
        in bed; person taking bath = person in a bath; person getting haircut = person getting a haircut;
        person getting massage = person getting a massage; person walking = walking person; person standing =
        standing person; person kneeling = kneeling person; person running = runner; woman dancing = dancing
        woman; man dancing = dancing man; people with bunny ears = ~dancers with bunny ears; person raising
        hand = person raising a hand; person bowing = bowing person; person facepalming = facepalming person;
        person shrugging = shrugging person; person in lotus position = meditating person; person with white
        cane = person with a white cane""",
    ("profession", "people"): """
        health worker; student; teacher; judge; farmer; cook; mechanic; factory worker = welder; office
        worker; scientist; technologist = programmer; singer; artist; pilot; astronaut; firefighter; police
        officer; detective; guard = royal guard; ninja; construction worker; prince; princess""",
    ("athlete", "people"): """
        person fencing = fencer; horse racing = jockey; skier; snowboarder; person golfing = golfer; person
        surfing = surfer; person rowing boat = rower; person swimming = swimmer; person bouncing ball =
        basketball player; person lifting weights = weightlifter; person biking = cyclist; person cartwheeling
        = gymnast; people wrestling = ~wrestlers; person playing water polo = water polo player; person
        playing handball = handball player; person juggling = juggler; person climbing = climber""",
    ("fantasy figure", "fantasy"): """
        unicorn; dragon; baby angel = angel; Santa Claus = ~Santa Claus; Mrs. Claus = ~Mrs Claus; superhero;
        supervillain; mage = wizard; fairy; vampire; mermaid; elf; genie; zombie; troll; ogre; goblin; ghost;
        alien; alien monster = space invader; robot""",
    ("smiley", "faces"): """
        clown face; grinning face; face with tears of joy; rolling on the floor laughing = rolling laughing
        face; upside-down face; melting face; winking face; smiling face with halo = smiling face with a halo;
        smiling face with hearts; smiling face with heart-eyes = heart-eyes face; star-struck = star-struck
        face; face blowing a kiss; face savoring food = face licking its lips; face with tongue = face with
        its tongue out; zany face; money-mouth face; smiling face with open hands = hugging face; cowboy hat
        face; partying face; disguised face; smiling face with sunglasses = face with sunglasses; nerd face;
        face with monocle = face with a monocle; smiling face with horns; face with hand over mouth = giggling
        face; shushing face; thinking face; saluting face; zipper-mouth face; face without mouth = face
        without a mouth; dotted line face; face in clouds = face in the clouds; face with rolling eyes;
        grimacing face; lying face = face with a long nose; drooling face; sleeping face; confused face;
        pleading face; flushed face; crying face; loudly crying face; face screaming in fear = screaming face;
        yawning face; face with steam from nose = face huffing steam; enraged face; face with symbols on mouth
        = swearing face; exploding head; face with medical mask = face with a mask; face with thermometer =
        face with a thermometer; face with head-bandage = face with a bandage; nauseated face; face vomiting =
        vomiting face; sneezing face; hot face; cold face; woozy face; face with spiral eyes = dizzy face""",
    ("body part", "body"): """
        skull; flexed biceps; mechanical arm; mechanical leg; leg; foot; ear; nose; brain; anatomical heart =
        human heart; lungs = ~lungs; tooth; bone; eyes = ~eyes; eye; tongue; mouth""",
    ("hand sign", "body"): """
        waving hand; hand with fingers splayed = spread hand; vulcan salute = Vulcan salute; OK hand; pinched
        fingers = ~pinched fingers; victory hand; crossed fingers = ~crossed fingers; sign of the horns =
        horns sign; call me hand; backhand index pointing left = hand pointing left; backhand index pointing
        right = hand pointing right; backhand index pointing up = hand pointing up; backhand index pointing
        down = hand pointing down; thumbs up = ~thumbs up; thumbs down = ~thumbs down; raised fist; oncoming
        fist = fist bump; clapping hands = ~clapping hands; raising hands = ~raised hands; heart hands =
        ~heart hands; handshake; folded hands = ~folded hands; writing hand""",
    ("cat face", "faces"): """
        grinning cat; cat with tears of joy = laughing cat; smiling cat with heart-eyes = heart-eyes cat; cat
        with wry smile = smirking cat; kissing cat; weary cat; crying cat; pouting cat = angry cat""",
    ("heart", "symbols"): """
        heart with arrow = heart with an arrow; heart with ribbon = heart with a ribbon; sparkling heart;
        beating heart; two hearts = ~two hearts; broken heart; heart on fire; mending heart = bandaged heart;
        red heart; pink heart; orange heart; yellow heart; green heart; blue heart; purple heart; brown heart;
        black heart; white heart""",
    ("warning sign", "symbols"): """
        warning = warning triangle; children crossing = children crossing sign; no entry = no-entry sign;
        prohibited = prohibition sign; no bicycles = no-bicycles sign; no smoking = no-smoking sign; no
        littering = no-littering sign; non-potable water = no-drinking-water sign; no pedestrians =
        no-pedestrians sign; no mobile phones = no-phones sign; no one under eighteen = adults-only sign;
        radioactive = radioactivity sign; biohazard = biohazard sign""",
    ("public sign", "symbols"): """
        ATM sign; litter in bin sign = litter bin sign; potable water = drinking water sign; wheelchair
        symbol; men’s room = men's room sign; women’s room = women's room sign; restroom = restroom sign; baby
        symbol; water closet = WC sign; passport control = passport control sign; baggage claim = baggage
        claim sign; recycling symbol""",
    ("religious symbol", "symbols"): """
        om = om symbol; star of David = Star of David; wheel of dharma = Dharma wheel; yin yang = ~yin and
        yang; latin cross = Latin cross; orthodox cross = Orthodox cross; star and crescent; peace symbol;
        menorah; atom symbol; khanda""",
    ("special flag", "flags"): """
        chequered flag; triangular flag; crossed flags = ~crossed flags; black flag; white flag; rainbow flag;
        transgender flag; pirate flag""",
}

# Flags kept beside those of the members of the United Nations. Territories that fly another country's flag, or one
# that can't be told from another's at 64 pixels, are left out.
TERRITORIES = "VA XK TW PS HK MO GL FO PR AW GU BM GI IM JE GG PF AS CK AX"
# Drawn like another country's flag: Monaco's is Indonesia's.
LEFT_OUT_FLAGS = "MC"

COUNTRY_NAMES = _table("""
    AX Aland Islands; CD DR Congo; CG Republic of the Congo; CI Ivory Coast; CZ Czechia; FM Micronesia; MO Macau;
    ST Sao Tome and Principe; SZ Eswatini; TL East Timor; TR Turkey
""")
# Countries that take "the" inside a sentence.
THE = "AE AX BS CD CF CG CK DO FO GB GM IM KM MH MV NL PH SB US"

# A fact that is disputed, has more than one right answer, changed lately or gives itself away
# (the capital of Luxembourg) is not asked.
CAPITALS = _table("""
    AG Saint John's; BO -; DJ -; GD Saint George's; GG Saint Peter Port; GI -; GQ -; GU Hagatna; HK -; ID -; IL -;
    LK -; LU -; MN Ulaanbaatar; MV Male; NR -; PF Papeete; PS -; SG -; SM -; SZ -; US Washington; VA -; ZA -
""")
CONTINENTS = _table("""
    AM -; AZ -; CY -; GE -; KZ -; RU -; TR -
""")
CURRENCIES = _table("""
    AE Emirati dirham; BA convertible mark; BG euro; BN Brunei dollar; BS Bahamian dollar; BT Bhutanese ngultrum;
    CD Congolese franc; CK New Zealand dollar; CU Cuban peso; FO Danish krone; GE Georgian lari; GG -; GL Danish
    krone; GM Gambian dalasi; IM -; JE -; KG Kyrgyz som; KH Cambodian riel; KI Australian dollar; LA Lao kip; LS
    Lesotho loti; MK Macedonian denar; MN Mongolian tugrik; NA Namibian dollar; NP Nepalese rupee; PA Panamanian
    balboa; PS -; ST Sao Tome dobra; SZ Swazi lilangeni; TJ Tajik somoni; TM Turkmen manat; TT Trinidad and
    Tobago dollar; TV Australian dollar; UZ Uzbek som; VE Venezuelan bolivar; WS Samoan tala; ZW -
""")
# The official language, by law or in practice; not asked where a country has two or more.
LANGUAGES = _table("""
    AR Spanish; AT German; AZ Azerbaijani; BZ English; CD French; CG French; CZ Czech; GW Portuguese; IL Hebrew;
    IR Persian; JM English; KG Kyrgyz; KZ Kazakh; LB Arabic; MD Romanian; ME Montenegrin; MV Dhivehi; MY Malay;
    NA English; NO Norwegian; PE Spanish; SS English; TJ Tajik; TM Turkmen; UZ Uzbek; AF -; AS -; AW -; BA -;
    BE -; BF -; BI -; BO -; BW -; BY -; CA -; CF -; CH -; CK -; CM -; CY -; DJ -; DZ -; ER -; ET -; FI -; FJ -;
    FO -; GG -; GQ -; GU -; HK -; HT -; IE -; IM -; IN -; IQ -; JE -; KE -; KI -; KM -; LK -; LS -; LU -; MA -;
    MG -; MH -; ML -; MO -; MT -; MU -; MW -; NE -; NR -; NZ -; PG -; PH -; PK -; PR -; PW -; PY -; RW -; SC -;
    SD -; SG -; SO -; SZ -; TD -; TL -; TO -; TV -; TZ -; UG -; VA -; VU -; WS -; XK -; ZA -; ZW -
""")

# Light tints, far enough apart for a small model (and a reader), on which white drawings stay visible.
BACKGROUNDS = {
    "blue": "#b3d1ff",
    "green": "#b5eab0",
    "yellow": "#fff3a0",
    "pink": "#ffc4dd",
    "orange": "#ffc890",
    "purple": "#d5bdfa",
    "grey": "#c9cdd1",
    "brown": "#cbb08f",
}

# Question templates, shared by the case files, by the training of the small models and by anybody who asks them.
# `image` questions go with a picture, `text` ones without. `template.format(**fact)` fills a text question from a line
# of facts.jsonl.gz: {it} is a concept in a sentence ("a red apple", "the Netherlands"), {is} and {does} agree with it,
# {city} is a capital. The first of each list is the plain form.
TEMPLATES: dict[str, dict[str, list[str]]] = {
    "name": {
        "image": [
            "What is this?",
            "What does the picture show?",
            "What can you see here?",
            "Name what is drawn here.",
        ],
    },
    "kind": {
        "image": [
            "What kind of thing is this?",
            "What sort of thing does the picture show?",
            "What type of thing is drawn here?",
            "Say what kind of thing you see.",
        ],
        "text": [
            "What kind of thing {is} {it}?",
            "What sort of thing {is} {it}?",
            "Say what kind of thing {it} {is}.",
        ],
    },
    "category": {
        "image": [
            "Which category does this belong to?",
            "What category is the thing in the picture in?",
            "Name the category of this.",
            "Under which category would you file this picture?",
        ],
        "text": [
            "Which category {does} {it} belong to?",
            "Under which category would you file {it}?",
            "Name the category of {it}.",
        ],
    },
    "background": {
        "image": [
            "What colour is the background?",
            "Which colour lies behind the drawing?",
            "Name the background colour.",
            "On what colour is this drawn?",
        ],
    },
    "country": {
        "image": [
            "Which country has this flag?",
            "Whose flag is this?",
            "Name the country this flag belongs to.",
            "This is the flag of which country?",
        ],
        "text": [
            "Which country has the capital {city}?",
            "{city} is the capital of which country?",
            "Name the country whose capital is {city}.",
        ],
    },
    "capital": {
        "image": [
            "What is the capital of the country with this flag?",
            "Which city is the capital of the country this flag belongs to?",
            "Name the capital of the country with this flag.",
            "The country with this flag has which capital?",
        ],
        "text": [
            "What is the capital of {it}?",
            "Which city is the capital of {it}?",
            "Name the capital of {it}.",
        ],
    },
    "continent": {
        "image": [
            "On which continent is the country with this flag?",
            "Which continent does the country with this flag lie on?",
            "Name the continent of the country with this flag.",
            "The country with this flag is part of which continent?",
        ],
        "text": [
            "On which continent do you find {it}?",
            "Which continent is home to {it}?",
            "Name the continent of {it}.",
        ],
    },
    "currency": {
        "image": [
            "What is the currency of the country with this flag?",
            "Which money is used in the country with this flag?",
            "Name the currency of the country with this flag.",
            "With what currency do people pay in the country with this flag?",
        ],
        "text": [
            "What is the currency of {it}?",
            "Which money is used in {it}?",
            "Name the currency of {it}.",
        ],
    },
    "language": {
        "image": [
            "What is the official language of the country with this flag?",
            "Which language is official in the country with this flag?",
            "Name the official language of the country with this flag.",
            "The country with this flag has which official language?",
        ],
        "text": [
            "What is the official language of {it}?",
            "Which language is official in {it}?",
            "Name the official language of {it}.",
        ],
    },
}
