import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Properties;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.clients.producer.RecordMetadata;
import org.apache.kafka.common.header.internals.RecordHeader;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/** Sends messages as a Java service does; prints `partition offset kind` of each committed message.
 *
 *  java -cp JARS ForeignProducer.java SERVERS TOPIC IMAGE
 */
public class ForeignProducer {
    public static void main(String[] arguments) throws Exception {
        String servers = arguments[0], topic = arguments[1];
        byte[] image = Files.readAllBytes(Path.of(arguments[2]));
        for (String compression : List.of("none", "gzip", "snappy", "lz4", "zstd")) {
            try (KafkaProducer<byte[], byte[]> producer = producer(servers, compression, null)) {
                List<ProducerRecord<byte[], byte[]>> records = new ArrayList<>();
                for (int number = 0; number < 4; number++) {
                    ProducerRecord<byte[], byte[]> record = new ProducerRecord<>(topic, "camera".getBytes(), image);
                    record.headers().add(new RecordHeader("ce_id", (compression + number).getBytes()));
                    record.headers().add(new RecordHeader("note", null)).add(new RecordHeader("note", new byte[] {0, -1}));
                    records.add(record);
                }
                records.add(new ProducerRecord<>(topic, null, new byte[] {1, 2, 3}));
                records.add(new ProducerRecord<>(topic, "tombstone".getBytes(), null));
                send(producer, records, compression);
            }
        }
        try (KafkaProducer<byte[], byte[]> producer = producer(servers, "lz4", "foreign-" + topic)) {
            producer.initTransactions();
            for (int number = 0; number < 3; number++) {
                producer.beginTransaction();
                List<ProducerRecord<byte[], byte[]>> records = List.of(
                    new ProducerRecord<>(topic, null, image), new ProducerRecord<>(topic, new byte[0], image));
                if (number == 1) {
                    for (ProducerRecord<byte[], byte[]> record : records) producer.send(record);
                    producer.flush();
                    producer.abortTransaction();
                } else {
                    send(producer, records, "transaction");
                    producer.commitTransaction();
                }
            }
        }
    }

    static KafkaProducer<byte[], byte[]> producer(String servers, String compression, String transactionalId) {
        Properties properties = new Properties();
        properties.put(ProducerConfig.BOOTSTRAP_SERVERS_CONFIG, servers);
        properties.put(ProducerConfig.COMPRESSION_TYPE_CONFIG, compression);
        properties.put(ProducerConfig.ENABLE_IDEMPOTENCE_CONFIG, true);
        properties.put(ProducerConfig.LINGER_MS_CONFIG, 50);
        if (transactionalId != null) properties.put(ProducerConfig.TRANSACTIONAL_ID_CONFIG, transactionalId);
        return new KafkaProducer<>(properties, new ByteArraySerializer(), new ByteArraySerializer());
    }

    static void send(
            KafkaProducer<byte[], byte[]> producer, List<ProducerRecord<byte[], byte[]>> records, String kind)
            throws Exception {
        List<java.util.concurrent.Future<RecordMetadata>> sending = new ArrayList<>();
        for (ProducerRecord<byte[], byte[]> record : records) sending.add(producer.send(record));
        producer.flush();
        for (java.util.concurrent.Future<RecordMetadata> one : sending) {
            System.out.println(one.get().partition() + " " + one.get().offset() + " " + kind);
        }
    }
}
