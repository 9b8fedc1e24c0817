"""Class names of the published weights, and which names of different data sets mean the same thing."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["COCO_IDS", "COCO_NAMES", "OBJECTS365_NAMES", "SAME", "match_names"]

COCO_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
    *("scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""COCO's 80 classes in the order in which published detectors answer."""

_NOT_IN_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(number for number in range(1, 91) if number not in _NOT_IN_COCO)
"""Their category ids: 1 to 90 with ten gaps."""

OBJECTS365_NAMES = (
    *("Person", "Sneakers", "Chair", "Other Shoes", "Hat", "Car", "Lamp", "Glasses", "Bottle", "Desk"),
    *("Cup", "Street Lights", "Cabinet/shelf", "Handbag/Satchel", "Bracelet", "Plate", "Picture/Frame", "Helmet"),
    *("Book", "Gloves", "Storage box", "Boat", "Leather Shoes", "Flower", "Bench", "Potted Plant", "Bowl/Basin"),
    *("Flag", "Pillow", "Boots", "Vase", "Microphone", "Necklace", "Ring", "SUV", "Wine Glass", "Belt"),
    *("Moniter/TV", "Backpack", "Umbrella", "Traffic Light", "Speaker", "Watch", "Tie", "Trash bin Can", "Slippers"),
    *("Bicycle", "Stool", "Barrel/bucket", "Van", "Couch", "Sandals", "Bakset", "Drum", "Pen/Pencil", "Bus"),
    *("Wild Bird", "High Heels", "Motorcycle", "Guitar", "Carpet", "Cell Phone", "Bread", "Camera", "Canned"),
    *("Truck", "Traffic cone", "Cymbal", "Lifesaver", "Towel", "Stuffed Toy", "Candle", "Sailboat", "Laptop"),
    *("Awning", "Bed", "Faucet", "Tent", "Horse", "Mirror", "Power outlet", "Sink", "Apple", "Air Conditioner"),
    *("Knife", "Hockey Stick", "Paddle", "Pickup Truck", "Fork", "Traffic Sign", "Ballon", "Tripod", "Dog", "Spoon"),
    *("Clock", "Pot", "Cow", "Cake", "Dinning Table", "Sheep", "Hanger", "Blackboard/Whiteboard", "Napkin"),
    *("Other Fish", "Orange/Tangerine", "Toiletry", "Keyboard", "Tomato", "Lantern", "Machinery Vehicle", "Fan"),
    *("Green Vegetables", "Banana", "Baseball Glove", "Airplane", "Mouse", "Train", "Pumpkin", "Soccer", "Skiboard"),
    *("Luggage", "Nightstand", "Tea pot", "Telephone", "Trolley", "Head Phone", "Sports Car", "Stop Sign", "Dessert"),
    *("Scooter", "Stroller", "Crane", "Remote", "Refrigerator", "Oven", "Lemon", "Duck", "Baseball Bat"),
    *("Surveillance Camera", "Cat", "Jug", "Broccoli", "Piano", "Pizza", "Elephant", "Skateboard", "Surfboard"),
    *("Gun", "Skating and Skiing shoes", "Gas stove", "Donut", "Bow Tie", "Carrot", "Toilet", "Kite", "Strawberry"),
    *("Other Balls", "Shovel", "Pepper", "Computer Box", "Toilet Paper", "Cleaning Products", "Chopsticks"),
    *("Microwave", "Pigeon", "Baseball", "Cutting/chopping Board", "Coffee Table", "Side Table", "Scissors"),
    *("Marker", "Pie", "Ladder", "Snowboard", "Cookies", "Radiator", "Fire Hydrant", "Basketball", "Zebra", "Grape"),
    *("Giraffe", "Potato", "Sausage", "Tricycle", "Violin", "Egg", "Fire Extinguisher", "Candy", "Fire Truck"),
    *("Billards", "Converter", "Bathtub", "Wheelchair", "Golf Club", "Briefcase", "Cucumber", "Cigar/Cigarette"),
    *("Paint Brush", "Pear", "Heavy Truck", "Hamburger", "Extractor", "Extention Cord", "Tong", "Tennis Racket"),
    *("Folder", "American Football", "earphone", "Mask", "Kettle", "Tennis", "Ship", "Swing", "Coffee Machine"),
    *("Slide", "Carriage", "Onion", "Green beans", "Projector", "Frisbee", "Washing Machine/Drying Machine"),
    *("Chicken", "Printer", "Watermelon", "Saxophone", "Tissue", "Toothbrush", "Ice cream", "Hotair ballon", "Cello"),
    *("French Fries", "Scale", "Trophy", "Cabbage", "Hot dog", "Blender", "Peach", "Rice", "Wallet/Purse"),
    *("Volleyball", "Deer", "Goose", "Tape", "Tablet", "Cosmetics", "Trumpet", "Pineapple", "Golf Ball", "Ambulance"),
    *("Parking meter", "Mango", "Key", "Hurdle", "Fishing Rod", "Medal", "Flute", "Brush", "Penguin", "Megaphone"),
    *("Corn", "Lettuce", "Garlic", "Swan", "Helicopter", "Green Onion", "Sandwich", "Nuts", "Speed Limit Sign"),
    *("Induction Cooker", "Broom", "Trombone", "Plum", "Rickshaw", "Goldfish", "Kiwi fruit", "Router/modem"),
    *("Poker Card", "Toaster", "Shrimp", "Sushi", "Cheese", "Notepaper", "Cherry", "Pliers", "CD", "Pasta"),
    *("Hammer", "Cue", "Avocado", "Hamimelon", "Flask", "Mushroon", "Screwdriver", "Soap", "Recorder", "Bear"),
    *("Eggplant", "Board Eraser", "Coconut", "Tape Measur/ Ruler", "Pig", "Showerhead", "Globe", "Chips", "Steak"),
    *("Crosswalk Sign", "Stapler", "Campel", "Formula 1", "Pomegranate", "Dishwasher", "Crab", "Hoverboard"),
    *("Meat ball", "Rice Cooker", "Tuba", "Calculator", "Papaya", "Antelope", "Parrot", "Seal", "Buttefly"),
    *("Dumbbell", "Donkey", "Lion", "Urinal", "Dolphin", "Electric Drill", "Hair Dryer", "Egg tart", "Jellyfish"),
    *("Treadmill", "Lighter", "Grapefruit", "Game board", "Mop", "Radish", "Baozi", "Target", "French"),
    *("Spring Rolls", "Monkey", "Rabbit", "Pencil Case", "Yak", "Red Cabbage", "Binoculars", "Asparagus", "Barbell"),
    *("Scallop", "Noddles", "Comb", "Dumpling", "Oyster", "Table Teniis paddle", "Cosmetics Brush/Eyeliner Pencil"),
    *("Chainsaw", "Eraser", "Lobster", "Durian", "Okra", "Lipstick", "Cosmetics Mirror", "Curling", "Table Tennis"),
)
"""The 365 classes of Objects365 v2, as its annotations spell them; their category ids are 1 to 365.

The published heads have 366 rows, for they answer with the category id itself: row 0 was never trained.
"""

SAME: tuple[tuple[str, ...], ...] = (
    ("bird", "Wild Bird"),
    ("handbag", "Handbag/Satchel"),
    ("suitcase", "Luggage"),
    ("skis", "Skating and Skiing shoes"),
    ("sports ball", "Baseball"),
    ("bowl", "Bowl/Basin"),
    ("orange", "Orange/Tangerine"),
    ("dining table", "Dinning Table", "diningtable"),
    ("tv", "Moniter/TV", "Monitor/TV", "tvmonitor"),
    ("teddy bear", "Stuffed Toy"),
    ("hair drier", "Hair Dryer"),
    ("airplane", "aeroplane"),
    ("motorcycle", "motorbike"),
    ("couch", "sofa"),
    ("potted plant", "pottedplant"),
)
"""Names that take over one another's rows: COCO's, Objects365's or Pascal VOC's, further spellings.

Which class of Objects365 is nearest where none has COCO's name was chosen by D-FINE's authors (spec 2.4).
"""


def match_names(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each wanted name the index of the known one that means the same, or None.

    The same letters come first, then another case or other separators, then the table above.

    >>> match_names(["Dog", "hot_dog", "Monitor/TV", "unicorn"], ["tv", "dog", "hot dog"])
    [1, 2, 0, None]
    """
    found: list[int | None] = [None] * len(wanted)
    for spelled in (str, _plain, _meaning):
        index = {spelled(name): i for i, name in reversed(list(enumerate(known)))}  # the first of several wins
        found = [index.get(spelled(name)) if i is None else i for name, i in zip(wanted, found, strict=True)]
    return found


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


_FIRST = {_plain(name): _plain(group[0]) for group in SAME for name in group}


def _meaning(name: str) -> str:
    return _FIRST.get(_plain(name), _plain(name))
