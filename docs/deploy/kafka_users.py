"""Make a topic, three users, and give each just the rights it needs; doing so again changes only passwords.

    python kafka_users.py SERVERS TOPIC PASSWORDS

SERVERS is a listener where we are an administrator; PASSWORDS is a folder with a line of password in each of the files
kafka-streamer, kafka-publisher and kafka-operator. Right `Describe` comes with each of the others. Without an
answers topic the service needs no right to a consumer group or a transaction; with one, see docs/answers.md.
"""

import sys
from contextlib import closing, suppress
from pathlib import Path

from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    KafkaAdminClient,
    NewTopic,
    ResourcePattern,
    ResourceType,
    UserScramCredentialUpsertion,
)
from kafka.errors import TopicAlreadyExistsError

RIGHTS = {
    "streamer": [ACLOperation.READ],  # stream, status
    "publisher": [ACLOperation.WRITE],  # publish, gateway, replay
    "operator": [ACLOperation.READ, ACLOperation.WRITE],  # dashboard, and whoever does all of it by hand
}
TIMEOUT_MS = 60_000


def main(servers: str, topic: str, passwords: Path) -> None:
    """Do it.

    Raises:
        SystemExit: the broker did not take a user.
    """
    with closing(KafkaAdminClient(bootstrap_servers=servers, bootstrap_timeout_ms=TIMEOUT_MS)) as admin:
        with suppress(TopicAlreadyExistsError):
            admin.create_topics([NewTopic(topic, num_partitions=-1, replication_factor=-1)])
        users = []
        for user in RIGHTS:
            password = (passwords / f"kafka-{user}").read_text(encoding="utf-8").rstrip("\r\n")
            users.append(UserScramCredentialUpsertion(user, "SCRAM-SHA-512", password))
        failed = {user: why for user, why in admin.alter_user_scram_credentials(users).items() if why}
        if failed:
            sys.exit(f"the broker does not take the users: {failed}")
        on = ResourcePattern(ResourceType.TOPIC, topic)
        allow = ACLPermissionType.ALLOW
        admin.create_acls([ACL(f"User:{user}", "*", one, allow, on) for user, some in RIGHTS.items() for one in some])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
