"""Create the topic and three users with the permissions that each needs; a repeated run changes only passwords.

    python kafka_users.py SERVERS TOPIC PASSWORDS

SERVERS is a listener with administrator permissions. PASSWORDS is a folder with the files kafka-streamer,
kafka-publisher and kafka-operator, each with a password in one line. `Read` and `Write` imply `Describe`. Permissions
for consumer groups and transactions are needed only for an answers topic: see docs/answers.md.
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
    "operator": [ACLOperation.READ, ACLOperation.WRITE],  # dashboard, manual operation
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
            sys.exit(f"the broker does not accept the users: {failed}")
        on = ResourcePattern(ResourceType.TOPIC, topic)
        allow = ACLPermissionType.ALLOW
        admin.create_acls([ACL(f"User:{user}", "*", one, allow, on) for user, some in RIGHTS.items() for one in some])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
